"""Coded chunks: the same bits in fewer bytes, in every call, and nothing worse than a refusal from a stranger."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_host import D, make_batch, take_step

from fednano.errors import ConfigError, HostRefused
from fednano.host import RemoteLLM, RunningHost, client, codec
from fednano.host.planes import expand, squeeze
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto.language_host_pb2_grpc import LanguageHostStub
from fednano.host.wire import chunk_message, coded_message, parse
from fednano.models.language import LocalLLM


def bits(plane: np.ndarray) -> float:
    """Shannon's bound on coding each byte of a plane by itself."""
    shares = np.bincount(plane, minlength=256) / len(plane)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum() * len(plane))


@settings(max_examples=100, deadline=None)
@given(
    raw=st.binary(min_size=1, max_size=3000) | st.integers(1, 9000).map(bytes),
    repeat=st.integers(1, 50),
)
@example(raw=b"\0", repeat=1)
@example(raw=bytes(range(256)) * 7 + b"abc", repeat=4)
def test_whatever_is_coded_comes_back(raw: bytes, repeat: int) -> None:
    raw *= repeat
    coded = squeeze(memoryview(raw))
    if coded is not None:
        assert len(coded) < len(raw)
        assert bytes(expand(coded, len(raw))) == raw


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 0.85), (torch.bfloat16, 0.70), (torch.float16, 0.86)]
)
def test_numbers_take_little_more_than_their_entropy(dtype: torch.dtype, most: float) -> None:
    numbers = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw = codec.raw(numbers)
    coded = squeeze(raw)
    assert coded is not None
    assert len(coded) <= most * len(raw)
    planes = np.frombuffer(raw, np.uint8).reshape(-1, 4).T
    bound = sum(min(bits(np.ascontiguousarray(plane)), 8 * len(plane)) for plane in planes) / 8
    assert bound < len(coded) < 1.04 * bound
    assert bytes(expand(coded, len(raw))) == bytes(raw)


def test_noise_travels_as_it_is() -> None:
    noise = memoryview(np.random.default_rng(0).bytes(1 << 16))
    assert squeeze(noise) is None
    assert coded_message(noise) == chunk_message(noise)
    assert squeeze(memoryview(b"")) is None


def test_a_coded_message_is_what_protobuf_makes_of_it() -> None:
    zeros = memoryview(bytes(100_000))
    coded = squeeze(zeros)
    assert coded is not None
    for kind in (pb.StepRequest, pb.StepReply, pb.PrivateReply, pb.KeepRequest, pb.FactoredRequest):
        message = kind(coded=coded)
        assert coded_message(zeros) == message.SerializeToString()
        assert parse(message.SerializeToString(), kind.FromString).ByteSize() == message.ByteSize()


def bomb(size: int) -> bytes:
    """Some kilobytes that say they are ``size`` bytes of zeros."""
    plane = zlib.compress(bytes(size // 4), 9, wbits=-15)
    return struct.pack("<5I", size, *[len(plane)] * 4) + plane * 4


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (b"", "expected a header"),
        (struct.pack("<5I", 0, 0, 0, 0, 0), "expected 1 to 1000"),
        (struct.pack("<5I", 1001, 0, 0, 0, 0) + bytes(1001), "expected 1 to 1000"),
        (struct.pack("<5I", 8, 0, 0, 0, 0) + bytes(7), "got 1 bytes in plane 3, expected 2"),
        (struct.pack("<5I", 8, 0, 0, 0, 0) + bytes(9), "expected 28 as its header says"),
        (struct.pack("<5I", 8, 3, 0, 0, 0) + b"\xff\xff\xff" + bytes(6), "not DEFLATE"),
        (struct.pack("<5I", 8, 2**32 - 1, 0, 0, 0) + bytes(6), "not DEFLATE"),
        (bomb(400)[:20] + bomb(800)[20:], "plane"),
        (bomb(1 << 28), "expected 1 to 1000"),
    ],
)
def test_other_forms_are_refused(coded: bytes, message: str) -> None:
    with pytest.raises(HostRefused, match=message):
        expand(coded, 1000)


def test_a_bomb_takes_no_memory() -> None:
    small = zlib.compress(bytes(1 << 28), 9, wbits=-15)  # 256 MiB in a quarter of one
    coded = struct.pack("<5I", 1 << 20, len(small), 0, 0, 0) + small
    tracemalloc.start()
    try:
        with pytest.raises(HostRefused, match="does not end"):
            expand(coded, 1 << 30)
        with pytest.raises(HostRefused, match=f"expected 1 to {4 << 20}"):
            expand(struct.pack("<I", 1 << 29) + coded[4:], 1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_gives_the_same_bits_from_fewer_bytes(
    private: bool, dtype: torch.dtype, local: LocalLLM, host: RunningHost
) -> None:
    embeds, mask, labels = make_batch([40, 30, 36, 9], [0, 3, 1, 0], seed=1)
    table = local.part.decoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
    head = local.part.head if private else None
    found, moved = [], []
    for lossless in (False, True):
        with RemoteLLM(
            host.address, insecure=True, wire_dtype=dtype, head=head, lossless=lossless, retry_seconds=5
        ) as llm:
            losses, gradient = take_step(llm, (embeds, mask, labels))
            moved.append((llm.wire.step.sent_bytes, llm.wire.step.received_bytes))
            answers = llm.generate(embeds, mask, 5, lambda ids: table[ids] * 1.5)
            scores = [] if private else llm.score(embeds, mask, labels)
            found.append([losses, gradient, answers, *scores])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    most = 0.75 if dtype == torch.bfloat16 else 0.9  # of little data: 115 tokens
    assert all(coded < most * plain for plain, coded in zip(*moved, strict=True))


def test_an_older_host_is_named(host: RunningHost, monkeypatch: pytest.MonkeyPatch) -> None:
    now = client.host_info
    monkeypatch.setattr(client, "host_info", lambda reply: replace(now(reply), lossless=False))
    batch = make_batch([4, 3])
    with RemoteLLM(host.address, insecure=True) as llm:
        take_step(llm, batch)
    with (
        RemoteLLM(host.address, insecure=True, lossless=True) as llm,
        pytest.raises(ConfigError, match="does not take coded chunks; update it"),
    ):
        take_step(llm, batch)


def test_a_host_refuses_what_it_cannot_take_apart_and_goes_on(host: RunningHost, local: LocalLLM) -> None:
    packed, data = codec.pack(torch.zeros(64, D), torch.float32, [30, 34])
    header = pb.StepRequest(header=pb.StepHeader(embeds=packed, objective="cross_entropy"))
    beyond = squeeze(memoryview(bytes(2 * len(data))))
    assert beyond is not None
    for coded in (bomb(1 << 28), b"x" * 50, beyond, b""):
        frames = [header, pb.StepRequest(coded=coded)]
        with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(LanguageHostStub(channel).Step(iter(frames), timeout=20))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        assert "coded chunk" in caught.value.details()  # type: ignore[attr-defined]
    batch = make_batch([4, 3])
    with RemoteLLM(host.address, insecure=True, lossless=True) as llm:
        assert all(
            torch.equal(a, b) for a, b in zip(take_step(llm, batch), take_step(local, batch), strict=True)
        )
    assert host.stats()["in_flight"] == host.stats()["buffered_bytes"] == 0
