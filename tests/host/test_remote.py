"""`RemoteLLM` is `LocalLLM`, to the bit, whatever the shapes; and its byte counts are the arithmetic."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_host import D, V, make_batch, step_in_child, take_step, tiny_part
from torch import Tensor

from fednano.errors import ConfigError, HostRefused, HostUnavailable
from fednano.host import HostLimits, RemoteLLM, RunningHost, serve
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.language import LanguageModel, LocalLLM


def connect(host: RunningHost, **options: Any) -> RemoteLLM:
    return RemoteLLM(host.address, **{"insecure": True, "retry_seconds": 5.0, **options})


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


rows = st.lists(st.tuples(st.integers(2, 20), st.integers(0, 5)), min_size=1, max_size=5)


@settings(max_examples=20, deadline=None)
@given(rows=rows, seed=st.integers(0, 2**31), chunk=st.sampled_from([7, 64, 1000, 1 << 20]))
def test_losses_and_gradients_equal_the_local_ones(
    local: LocalLLM, host: RunningHost, rows: list[tuple[int, int]], seed: int, chunk: int
) -> None:
    batch = make_batch([n for n, _ in rows], [p for _, p in rows], seed)
    weights = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) - 0.5
    with connect(host, chunk_bytes=chunk) as remote:
        for w in (None, weights):
            want, got = take_step(local, batch, w), take_step(remote, batch, w)
            assert torch.equal(got[0], want[0])
            if w is None:
                assert torch.equal(got[1], want[1])
            else:  # weighted before or after the backward pass
                assert relative(got[1], want[1]) < 1e-6


@settings(max_examples=10, deadline=None)
@given(rows=rows, seed=st.integers(0, 2**31), chunk=st.sampled_from([7, 1 << 20]))
def test_token_scores_equal_the_local_ones_and_the_model_itself(
    local: LocalLLM, host: RunningHost, rows: list[tuple[int, int]], seed: int, chunk: int
) -> None:
    embeds, mask, labels = make_batch([n for n, _ in rows], [p for _, p in rows], seed)
    with connect(host, chunk_bytes=chunk) as remote:
        found, here = remote.score(embeds, mask, labels), local.score(embeds, mask, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, here, strict=True))
    for scores, x, real, y in zip(found, embeds, mask.bool(), labels, strict=True):
        out = local.part.decoder(inputs_embeds=x[real][None])  # the sample alone
        logits = local.part.head(out.last_hidden_state[0, :-1]).double().detach()
        kept = y[real][1:] != -100
        log, wanted = logits[kept].log_softmax(-1), y[real][1:][kept]
        assert len(scores) == len(wanted)
        for row, each, token in zip(scores, log, wanted, strict=True):
            others = torch.cat([each[:token], each[token + 1 :]])
            mean = (each.exp() * each).sum()
            deviation = ((each.exp() * each.square()).sum() - mean.square()).clamp(min=0).sqrt()
            expected = torch.stack(
                [each[token], (each.argmax() == token).double(), mean, deviation, others.max()]
            )
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=6, deadline=None)
@given(rows=rows, seed=st.integers(0, 2**31), new=st.integers(1, 9), chunk=st.sampled_from([11, 1 << 20]))
def test_answers_equal_the_local_ones(
    local: LocalLLM, host: RunningHost, rows: list[tuple[int, int]], seed: int, new: int, chunk: int
) -> None:
    embeds, mask, _ = make_batch([n for n, _ in rows], [p for _, p in rows], seed)
    table = local.part.decoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
    with connect(host, chunk_bytes=chunk) as remote:
        for embed in (None, lambda ids: table[ids] * 1.5 + 0.1):
            want = local.generate(embeds, mask, new, embed)
            got = remote.generate(embeds, mask, new, embed)
            assert got.tolist() == want.tolist()
            assert got.dtype == torch.int64


def test_a_small_chunk_on_the_way_back_changes_nothing(local: LocalLLM) -> None:
    batch = make_batch([9, 4, 7], [0, 2, 1], 3)
    with serve(local, chunk_bytes=13) as host, connect(host) as remote:
        for got, want in zip(take_step(remote, batch), take_step(local, batch), strict=True):
            assert torch.equal(got, want)


def test_a_batch_beyond_the_limits_goes_in_several_requests(local: LocalLLM) -> None:
    batch = make_batch([9, 4, 7, 12, 3, 3, 3], [0, 2, 1, 0, 5, 0, 9], 3)
    want = take_step(local, batch)
    answers = local.generate(batch[0], batch[1], 4)
    per_token = D * 4 + 4
    for limits, requests in (
        (HostLimits(max_batch=2), 4),
        (HostLimits(max_tokens=18), 4),
        (HostLimits(max_request_bytes=16 * per_token), 4),
    ):
        with serve(local, limits=limits) as host, connect(host) as remote:
            losses, grad = take_step(remote, batch)
            assert relative(losses, want[0]) < 1e-6
            assert relative(grad, want[1]) < 1e-6
            assert remote.wire.step.calls == requests
            assert remote.wire.step.samples == 7
            assert remote.generate(batch[0], batch[1], 4).tolist() == answers.tolist()
            if limits.max_tokens == 18:
                with pytest.raises(HostRefused, match=r"sample 1 has 19 tokens .* the host takes at most 18"):
                    take_step(remote, make_batch([5, 19]))


def test_without_a_gradient_none_crosses_the_wire(local: LocalLLM, host: RunningHost) -> None:
    embeds, mask, labels = make_batch([5, 8])
    with connect(host) as remote:
        got = remote.loss(embeds, mask, labels)
        assert not got.requires_grad
        with torch.no_grad():
            again = remote.loss(embeds.clone().requires_grad_(), mask, labels, "inverted_hinge")
        assert not again.requires_grad
        assert torch.equal(got, local.loss(embeds, mask, labels))
        assert torch.equal(again, local.loss(embeds, mask, labels, "inverted_hinge"))
        assert remote.wire.step.received_bytes < 80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_wire_types_round_and_nothing_else(
    local: LocalLLM, host: RunningHost, dtype: torch.dtype
) -> None:
    embeds, mask, labels = make_batch([9, 6, 12], [0, 3, 0], 1)
    with connect(host, wire_dtype=dtype) as remote:
        losses, grad = take_step(remote, (embeds, mask, labels))
        assert remote.wire.step.sent_bytes < 27 * (D * 2 + 4) + 200
    want, exact = take_step(local, (embeds.to(dtype).float(), mask, labels))
    assert losses.dtype == grad.dtype == torch.float32
    if dtype == torch.bfloat16:
        assert torch.equal(losses, want)
        assert torch.equal(grad, exact.to(dtype).float())
    torch.testing.assert_close(losses, want, rtol=1e-3, atol=0)
    assert relative(grad, exact) < 2.0**-8


def test_int8_travels_in_a_quarter_of_the_bytes_and_trains_alike(local: LocalLLM, host: RunningHost) -> None:
    embeds, mask, labels = make_batch([9, 6, 12], [0, 3, 0], 1)
    with connect(host, wire_dtype=torch.int8) as remote:
        losses, grad = take_step(remote, (embeds, mask, labels))
        assert remote.wire.step.sent_bytes < 27 * (D + 4 + 4) + 200
        assert remote.wire.step.received_bytes < 27 * (D + 4) + 200
        prompts, prompt_mask, _ = make_batch([7, 5], seed=2)
        embed = torch.nn.Embedding(local.vocab_size, D)
        assert remote.generate(prompts, prompt_mask, 3, embed).shape == (2, 3)
    want, exact = take_step(local, (embeds, mask, labels))
    torch.testing.assert_close(losses, want, rtol=2e-2, atol=0)
    assert relative(grad, exact) < 0.05


def test_the_type_of_the_embeddings_is_kept(local: LocalLLM, host: RunningHost) -> None:
    embeds, mask, labels = make_batch([4, 5])
    with connect(host) as remote:
        for dtype in (torch.bfloat16, torch.float64):
            losses, grad = take_step(remote, (embeds.to(dtype), mask, labels))
            assert grad.dtype == dtype
            assert losses.dtype == torch.float32
            want = take_step(local, (embeds.to(dtype), mask, labels))
            assert relative(grad.float(), want[1].float()) < 1e-2


def varint(n: int) -> int:
    """Bytes of a protobuf varint."""
    return max(1, math.ceil(n.bit_length() / 7))


def framed(nbytes: int, chunk: int) -> int:
    """Serialised size of ``nbytes`` in chunks: each adds a tag and its length."""
    sizes = [chunk] * (nbytes // chunk) + ([nbytes % chunk] if nbytes % chunk else [])
    return sum(1 + varint(n) + n for n in sizes)


@pytest.mark.parametrize("chunk", [100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wire_counts_are_the_arithmetic(local: LocalLLM, chunk: int, dtype: torch.dtype) -> None:
    """Tensor bytes, plus 2 to 5 bytes a chunk, plus one header whose size depends on B alone."""
    lengths = [9, 4, 17]
    n = sum(lengths)
    size = dtype.itemsize
    with (
        serve(local, chunk_bytes=chunk) as host,
        connect(host, chunk_bytes=chunk, wire_dtype=dtype) as remote,
    ):
        remote.describe()
        take_step(remote, make_batch(lengths, [3, 0, 1]))
        packed = pb.Packed(dtype=pb.FLOAT32, hidden_size=D, lengths=lengths, scale=1.0)
        header = pb.StepRequest(
            header=pb.StepHeader(
                request_id="r" * 32,
                fingerprint=local.part.fingerprint,
                objective="cross_entropy",
                embeds=packed,
                want_gradient=True,
            )
        )
        result = pb.StepReply(header=pb.StepResult(losses=[1.0] * 3, gradient=packed))
        wire = remote.wire
        assert wire.step.sent_bytes == header.ByteSize() + framed(n * D * size, chunk) + framed(n * 4, chunk)
        assert wire.step.received_bytes == result.ByteSize() + framed(n * D * size, chunk)
        assert (wire.step.calls, wire.step.samples) == (1, 3)
        embeds, mask, _ = make_batch(lengths)
        answers = remote.generate(embeds, mask, 3)
        steps = max(
            3 if not set(row) & {2, 3} else 1 + min(map(row.index, set(row) & {2, 3}))
            for row in answers.tolist()
        )
        ask = pb.GenerateRequest(
            header=pb.GenerateHeader(
                request_id="r" * 32, fingerprint=local.part.fingerprint, embeds=packed, max_new_tokens=3
            )
        )
        wire = remote.wire
        assert wire.generate.sent_bytes == ask.ByteSize() + framed(n * D * size, chunk)
        assert wire.generate.received_bytes == steps * (2 + 3)  # ids below 128 take a byte each
        # What the client counts as sent is what the host counts as received, and the other way round.
        seen = remote.stats()
        for call, count in (("step", wire.step), ("generate", wire.generate)):
            assert seen[f"{call}_received_bytes"] == count.sent_bytes
            assert seen[f"{call}_sent_bytes"] == count.received_bytes
            assert seen[f"{call}_samples"] == count.samples
        assert wire.sent_bytes == wire.step.sent_bytes + wire.generate.sent_bytes
        assert wire.samples == 6


def test_many_clients_at_once_each_get_their_own(local: LocalLLM) -> None:
    batches = [make_batch([3 + i % 7, 10 - i % 5], [i % 3, 0], i) for i in range(24)]
    want = [take_step(local, batch) for batch in batches]
    got: dict[int, tuple[Tensor, Tensor]] = {}
    errors: list[BaseException] = []
    with serve(local, workers=2) as host, connect(host) as shared:

        def client(first: int) -> None:
            try:
                with connect(host) as own:
                    for i in range(first, 24, 8):
                        got[i] = take_step(own if first % 2 else shared, batches[i])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = host.stats()
    assert not errors
    for i, (losses, grad) in enumerate(want):
        assert torch.equal(got[i][0], losses)
        assert torch.equal(got[i][1], grad)
    assert stats["step_done"] == 24
    assert stats["in_flight"] == stats["buffered_bytes"] == 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_usable_from_other_processes(local: LocalLLM, host: RunningHost, method: str) -> None:
    with connect(host) as remote:
        want = take_step(remote, make_batch([4, 6], seed=5))
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        child = context.Process(target=step_in_child, args=(remote, queue))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork while threads run is what is tested
            child.start()
        losses, norm, samples = queue.get(timeout=60)
        child.join()
        queue.close()
        queue.join_thread()
        assert losses == want[0].tolist()
        assert norm == want[1].double().norm().item()
        assert samples == (4 if method == "fork" else 2)
        assert torch.equal(take_step(remote, make_batch([4, 6], seed=5))[1], want[1])


def test_a_pickled_client_is_a_new_connection(local: LocalLLM, host: RunningHost) -> None:
    with connect(host, wire_dtype=torch.bfloat16) as remote:
        take_step(remote, make_batch([4]))
        with pickle.loads(pickle.dumps(remote)) as copy:
            assert copy.address == remote.address
            assert copy.wire.calls == 0
            assert torch.equal(take_step(copy, make_batch([4]))[1], take_step(remote, make_batch([4]))[1])


def test_description(local: LocalLLM, host: RunningHost) -> None:
    with connect(host) as remote:
        info = remote.describe()
        interface: LanguageModel = remote
        assert interface.hidden_size == D
        assert (remote.hidden_size, remote.vocab_size, remote.max_positions) == (D, V, 64)
        assert (info.fingerprint, info.dtype) == ("tiny-0", "float32")
        assert (info.eos_token_ids, info.pad_token_id) == ((2, 3), 0)
        assert info.limits.max_tokens == HostLimits().max_tokens
        assert "inverted_hinge" in info.objectives


def test_the_client_refuses_what_the_local_model_refuses(local: LocalLLM, host: RunningHost) -> None:
    embeds, mask, labels = make_batch([4, 6])
    bad_labels, nan, hole = labels.clone(), embeds.clone(), mask.clone()
    bad_labels[1, 3], nan[0, 1, 2], hole[1, 2] = V, float("nan"), False
    with connect(host) as remote:
        for args in (
            (embeds[..., 1:], mask, labels),
            (nan, mask, labels),
            (embeds, hole, labels),
            (embeds, mask, bad_labels),
        ):
            with pytest.raises(HostRefused) as here:
                local.loss(*args)
            with pytest.raises(HostRefused) as there:
                remote.loss(*args)
            assert str(here.value) == str(there.value)
        with pytest.raises(ConfigError, match="unknown objective 'hinge'"):
            remote.loss(embeds, mask, labels, "hinge")
        with pytest.raises(HostRefused, match="max_new_tokens: got 0"):
            remote.generate(embeds, mask, 0)
        with pytest.raises(HostRefused, match=r"embed: got shape \(2, 3\)"):
            remote.generate(embeds, mask, 4, embed=lambda ids: torch.zeros(2, 3))
        with pytest.raises(ZeroDivisionError):
            remote.generate(embeds, mask, 4, embed=lambda ids: 1 / 0)  # type: ignore[arg-type, return-value]
        assert remote.wire.step.calls == 0
        take_step(remote, (embeds, mask, labels))


def test_a_host_with_another_model_is_noticed(local: LocalLLM) -> None:
    with serve(local) as first:
        remote = connect(first, retry_seconds=10)
        take_step(remote, make_batch([4]))
        address = first.address
    with (
        serve(LocalLLM(tiny_part(seed=1)), listen=address),
        pytest.raises(HostRefused, match="serves model tiny-1"),
    ):
        take_step(remote, make_batch([4]))
    remote.close()


def test_a_closed_client_and_bad_options() -> None:
    remote = RemoteLLM("127.0.0.1:1", insecure=True)
    remote.close()
    with pytest.raises(HostUnavailable, match="has been closed"):
        remote.describe()
    for options, message in (
        ({"wire_dtype": torch.int16}, "wire_dtype: got torch.int16"),
        ({"chunk_bytes": 0}, "chunk_bytes: got 0"),
        ({"timeout_s": 0.0}, "expected above 0"),
        ({"root_certificates": b"x"}, "insecure=True goes without certificates"),
        ({"insecure": False, "client_key": b"x"}, "client_key and client_certificate go together"),
    ):
        with pytest.raises(ConfigError, match=message):
            RemoteLLM("127.0.0.1:1", **{"insecure": True, **options})  # type: ignore[arg-type]
