"""Tensors on the wire, and the generated protocol code."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.errors import HostRefused
from fednano.host import codec
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto.generate import CHECKOUT, generate
from fednano.host.wire import ChunkFrame, chunk_message, parse

WIRE = [torch.float32, torch.bfloat16, torch.float16]


def through(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    data, scale = codec.encode(rows, dtype)
    assert len(data) == rows.numel() * dtype.itemsize
    return codec.decode(np.frombuffer(bytearray(data), np.uint8), dtype, scale).view(rows.shape)


@settings(deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 9), exponent=st.integers(-110, 110), seed=st.integers(0, 2**31))
def test_a_tensor_comes_back_as_its_rounding(n: int, d: int, exponent: int, seed: int) -> None:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    assert torch.equal(through(rows, torch.float32), rows)
    assert torch.equal(through(rows, torch.bfloat16), rows.bfloat16())
    # float16 with a common power of two: 11 bits for the largest, and nothing lost 2^-24 below it.
    error = (through(rows, torch.float16) - rows).abs()
    assert bool((error <= torch.maximum(rows.abs() * 2.0**-11, rows.abs().max() * 2.0**-38)).all())


@pytest.mark.parametrize("top", [1e-30, 1e-7, 1.0, 65504.0, 1e30])
def test_float16_neither_vanishes_nor_overflows(top: float) -> None:
    rows = torch.tensor([[top, -top / 3, top / 1000, 0.0]])
    torch.testing.assert_close(through(rows, torch.float16), rows, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", WIRE)
def test_zeros_and_non_finite_numbers_survive(dtype: torch.dtype) -> None:
    assert torch.equal(through(torch.zeros(2, 3), dtype).float(), torch.zeros(2, 3))
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    assert through(odd, dtype).float().tolist()[0][1:] == odd.tolist()[0][1:]
    assert through(odd, dtype)[0, 0].isnan()


def test_bytes_are_little_endian() -> None:
    assert bytes(codec.raw(torch.tensor([1.5, -2.0]))) == struct.pack("<2f", 1.5, -2.0)
    assert bytes(codec.raw(torch.tensor([1, -100], dtype=torch.int32))) == struct.pack("<2i", 1, -100)
    assert bytes(codec.raw(torch.tensor([1.5], dtype=torch.float16))) == struct.pack("<e", 1.5)
    labels = codec.decode_labels(np.frombuffer(struct.pack("<2i", 7, -100), np.uint8))
    assert labels.tolist() == [7, -100]
    assert labels.dtype == torch.int64


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3), size=st.integers(1, 17))
def test_chunks_reassemble(sizes: list[int], size: int) -> None:
    parts = [memoryview(bytes(range(i, i + n))) for i, n in enumerate(sizes)]
    buffer = codec.Assembler(sum(sizes), "test")
    for message in codec.Chunking(size).messages(pb.StepRequest, parts):
        assert 0 < len(message.chunk) <= size
        assert not buffer.complete
        buffer.add_frame(message)
    assert buffer.complete
    assert bytes(buffer.take(sum(sizes))) == b"".join(parts)


def test_wrong_lengths_are_refused() -> None:
    buffer = codec.Assembler(5, "step")
    buffer.add(b"123")
    with pytest.raises(HostRefused, match="step: got 3 bytes, expected 5 as the header says"):
        buffer.take(5)
    with pytest.raises(HostRefused, match="got a chunk of 3 bytes at byte 3, expected 5 bytes in all"):
        buffer.add(b"456")
    with pytest.raises(HostRefused, match="got a chunk of 0 bytes"):
        buffer.add(b"")
    with pytest.raises(HostRefused, match="got wire code 0, expected FLOAT32"):
        codec.wire_dtype(pb.DTYPE_UNSPECIFIED)


def test_generated_code_is_current(tmp_path: Path) -> None:
    """If this fails: run ``python fednano/host/proto/generate.py`` and commit what it writes."""
    for path in generate(tmp_path):
        committed = CHECKOUT / path.relative_to(tmp_path)
        assert path.read_bytes() == committed.read_bytes(), committed.name


def test_generated_code_imports_without_warnings() -> None:
    code = "import fednano.host.proto.language_host_pb2_grpc"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@given(n=st.integers(1, 6), d=st.integers(1, 40), exponent=st.integers(-30, 30), seed=st.integers(0, 9))
def test_int8_rounds_each_token_by_its_own_step(n: int, d: int, exponent: int, seed: int) -> None:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rows[0] = 0
    if n > 1:
        rows[1] *= 1e6  # a large token must not cost the others their digits
    data = codec.encode_rows(rows, torch.int8)
    assert len(data) == n * codec.row_bytes(torch.int8, d) == n * (d + 4)
    back = codec.decode_rows(np.frombuffer(data, dtype=np.uint8), torch.int8, d)
    step = rows.abs().amax(1, keepdim=True) / 127
    assert bool(((back - rows).abs() <= 0.5001 * step).all())
    assert torch.equal(back[0], rows[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_does_not_hide_what_is_not_finite(value: float) -> None:
    rows = torch.ones(2, 5)
    rows[1, 2] = value
    back = codec.decode_rows(
        np.frombuffer(codec.encode_rows(rows, torch.int8), dtype=np.uint8), torch.int8, 5
    )
    assert torch.equal(back[0], rows[0])
    assert not bool(back[1].isfinite().any())


@settings(deadline=None)
@given(st.integers(1, 70_000))
def test_a_chunk_is_framed_as_protobuf_would(length: int) -> None:
    data = bytes(index % 251 for index in range(length))
    message = pb.StepReply(chunk=data)
    assert chunk_message(memoryview(data)) == message.SerializeToString()
    assert parse(message.SerializeToString(), pb.StepReply.FromString).ByteSize() == message.ByteSize()
    header = pb.StepReply(header=pb.StepResult(losses=[1.0] * (length % 50)))
    assert parse(header.SerializeToString(), pb.StepReply.FromString).ByteSize() == header.ByteSize()


@settings(deadline=None)
@given(
    body=st.integers(0, 20_000).map(bytes) | st.binary(max_size=6000),
    kind=st.sampled_from(["chunk", "coded"]),
    tail=st.binary(max_size=3),
)
def test_large_chunks_are_read_as_protobuf_reads_them(body: bytes, kind: str, tail: bytes) -> None:
    data = pb.StepRequest(**{kind: body}).SerializeToString()  # type: ignore[arg-type]
    found = parse(data, pb.StepRequest.FromString)
    assert isinstance(found, ChunkFrame) == (len(data) > 4096)
    assert found.WhichOneof("frame") == kind
    assert bytes(getattr(found, kind)) == body
    assert found.ByteSize() == len(data)
    for other in (data + tail, data[: len(data) - len(tail)], tail + data):
        try:
            expected = pb.StepRequest.FromString(other)
        except DecodeError:
            with pytest.raises(DecodeError):
                parse(other, pb.StepRequest.FromString)
            continue
        found = parse(other, pb.StepRequest.FromString)
        assert found.WhichOneof("frame") == expected.WhichOneof("frame")
        assert bytes(found.chunk or found.coded) == (expected.chunk or expected.coded)


def test_a_length_of_many_bytes_ends() -> None:
    endless = b"\x12" + b"\xff" * 5000
    with pytest.raises(DecodeError):
        parse(endless, pb.StepRequest.FromString)
