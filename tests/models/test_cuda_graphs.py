"""Recorded passes: on the CPU with a pool that computes anew, on a GPU with CUDA's own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_passes import D, Small, batch, part
from torch import Tensor
from transformers import masking_utils

from fednano.errors import ConfigError
from fednano.models.cuda_graphs import CudaGraphs, Decode, Recorded, Size
from fednano.models.language import LocalLLM
from fednano.models.masks import plain_rows
from fednano.models.memory import Cost


class Replayed:
    """Computes a whole size from buffers that stay where they are, as a CUDA graph does."""

    def __init__(self, decode: Decode, x: Tensor) -> None:
        self._decode, self._x = decode, x.clone()
        self._graph: tuple[Tensor, Tensor] | None = None
        self.replays = 0

    def forward(self, x: Tensor) -> Tensor:
        self.replays += 1
        self._x.zero_()
        self._x[: x.shape[0], : x.shape[1]] = x
        with torch.enable_grad():
            own = self._x.clone().requires_grad_()
            self._graph = own, self._decode(own)
        return self._graph[1].detach()[: x.shape[0], : x.shape[1]]

    def backward(self, gradient: Tensor) -> Tensor:
        assert self._graph is not None
        whole = torch.zeros_like(self._x)
        whole[: gradient.shape[0], : gradient.shape[1]] = gradient
        (found,) = torch.autograd.grad(self._graph[1], self._graph[0], whole)
        return found[: gradient.shape[0], : gradient.shape[1]]


class Eager:
    """A pool of such; each place of the largest holds 100 bytes."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.held = 0
        self.fails = False
        self.users: list[str] = []

    def record(self, decode: Decode, x: Tensor) -> Recorded:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.sizes.append(tuple(x.shape))
        self.held = max(self.held, 100 * x.shape[0] * x.shape[1])
        return Replayed(decode, x)

    def follow(self) -> None:
        self.users.append("follow")

    def used(self) -> None:
        self.users.append("used")

    def finish(self) -> None:
        self.users.append("finish")


def recording(total: int = 10**9) -> tuple[LocalLLM, list[Eager]]:
    """A model on the CPU that records its passes, and the pools that it makes."""
    llm, pools = LocalLLM(part(), memory=Small(total)), []

    def pool() -> Eager:
        pools.append(Eager())
        return pools[-1]

    passes = llm.passes
    passes._cost = Cost(1000, 100, 10)
    passes.graphs = CudaGraphs(passes._decode, D, passes.dtype, passes.device, 64, pool)
    return llm, pools


def step(llm: LocalLLM, lengths: list[int], seed: int = 0, want: bool = True) -> tuple[Tensor, Tensor | None]:
    return llm.loss_and_gradient(*batch(lengths, seed), "cross_entropy", want)


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 70), tokens=st.integers(1, 3000), longest=st.sampled_from([64, 100, 2048, 4096])
)
def test_a_size_holds_the_batch_and_wastes_little_where_padding_costs_time(
    samples: int, tokens: int, longest: int
) -> None:
    tokens = min(tokens, longest)
    size = Size.of(samples, tokens, longest)
    assert size.samples >= samples
    assert tokens <= size.tokens <= longest
    assert Size.of(size.samples, size.tokens, longest).places <= 2 * size.places
    if samples * tokens > 1024:
        assert size.samples == samples
        assert size.tokens < tokens + 16
    else:
        assert size.places < 2 * samples * (tokens * 1.25 + 16)


def test_the_sizes_of_small_batches_are_few() -> None:
    found = {Size.of(b, t, 4096) for b in range(1, 65) for t in range(1, 1024 // b + 1)}
    assert len(found) < 130


@pytest.mark.parametrize("lengths", [[9], [20, 7, 20, 13, 2], [16, 16], [33, 2]])
def test_a_size_that_came_often_is_replayed_with_the_same_results(lengths: list[int]) -> None:
    llm, pools = recording()
    alone = LocalLLM(part())
    for seed in range(6):
        for got, want in zip(step(llm, lengths, seed), step(alone, lengths, seed), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    size = Size.of(len(lengths), max(lengths), 64)
    assert pools[0].sizes == [(size.samples, size.tokens, D)]
    assert next(iter(llm.passes.graphs._recorded.values())).replays == 4  # type: ignore[union-attr, attr-defined]
    assert pools[0].users == ["follow", "used"] * 4
    losses, none = step(llm, lengths, 3, want=False)
    assert none is None
    torch.testing.assert_close(losses, step(alone, lengths, 3)[0], rtol=1e-5, atol=1e-7)


def test_what_is_given_back_is_the_callers_own() -> None:
    llm, _ = recording()
    for seed in range(3):
        step(llm, [12, 5], seed)
    first = step(llm, [12, 5], 7)
    kept = [None if tensor is None else tensor.clone() for tensor in first]
    step(llm, [12, 5], 8)
    for got, want in zip(first, kept, strict=True):
        assert torch.equal(got, want)  # type: ignore[arg-type]


def test_nothing_of_the_last_batch_stays_in_the_padding() -> None:
    llm, _ = recording()
    for seed in range(4):
        step(llm, [15, 15, 15], seed)
    short = step(llm, [14, 3, 2], 9)
    torch.testing.assert_close(short, step(LocalLLM(part()), [14, 3, 2], 9), rtol=1e-5, atol=1e-7)


def test_a_batch_that_needs_the_memory_gets_it() -> None:
    llm, pools = recording(total=8_000)
    for _ in range(4):
        step(llm, [8])
    assert pools[0].sizes == [(1, 16, D)]
    assert pools[0].held == 1_600
    step(llm, [20, 20, 20])  # 1,000 + 6,000 do not fit into 0.92 of 8,000 less what is held
    assert len(llm.passes.graphs or ()) == 0
    assert len(pools) == 2
    assert pools[0].users[-1] == "finish"  # what was launched last may still run
    for _ in range(4):  # more than half of what was there: not again
        step(llm, [8])
    assert pools[1].sizes == []


def test_memory_that_runs_out_after_all_takes_the_recorded_passes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm, pools = recording()
    for _ in range(4):
        step(llm, [8])
    forward, calls = llm.part.decoder.forward, []

    def once(*args: Any, **rest: Any) -> Any:
        calls.append(rest["inputs_embeds"].shape[0])
        if len(calls) == 1:
            raise torch.OutOfMemoryError("too much")
        return forward(*args, **rest)

    monkeypatch.setattr(llm.part.decoder, "forward", once)
    step(llm, [20, 20, 20])
    assert calls == [3, 3]  # whole again, not in parts
    assert len(pools) == 2


def test_a_size_for_which_there_is_no_memory_is_not_recorded() -> None:
    llm, pools = recording(total=20_000)
    for _ in range(5):
        step(llm, [60, 60])  # 13,000 bytes: 0.4 of what is free does not hold it
    assert pools[0].sizes == []
    for _ in range(5):
        step(llm, [60])
    assert pools[0].sizes == [(1, 64, D)]


def test_a_decoder_that_cannot_be_recorded_is_called(caplog: pytest.LogCaptureFixture) -> None:
    llm, pools = recording()
    pools[0].fails = True
    results = [step(llm, [8], 1) for _ in range(5)]
    for got, want in zip(results[-1], results[0], strict=True):
        assert torch.equal(got, want)  # type: ignore[arg-type]
    assert caplog.text.count("is not recorded: operation not permitted") == 1


def test_the_oldest_of_many_sizes_is_let_go() -> None:
    llm, pools = recording()
    llm.passes.graphs._most = 3  # type: ignore[union-attr]
    for length in (10, 20, 40, 60, 10, 10):
        for _ in range(3):
            step(llm, [length])
    assert [tokens for _, tokens, _ in pools[0].sizes] == [16, 32, 48, 64, 16]
    assert len(llm.passes.graphs or ()) == 3


def test_several_threads_take_turns() -> None:
    llm, _ = recording()
    alone = LocalLLM(part())
    wanted = {seed: step(alone, [10, 4], seed) for seed in range(8)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(6):
            for got, want in zip(step(llm, [10, 4], seed), wanted[seed], strict=True):
                if not torch.allclose(got, want, rtol=1e-5, atol=1e-7):  # type: ignore[arg-type]
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_on_a_cpu_records_nothing() -> None:
    with pytest.raises(ConfigError, match="CUDA graphs need a model on one GPU; this one lies on cpu"):
        LocalLLM(part(), graphs=True)


def test_transformers_does_not_look_for_packed_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = masking_utils.find_packed_sequence_indices
    ask = getattr(ask, "__wrapped__", ask)
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda rows: (asked.append(1), ask(rows))[1]
    )
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with plain_rows():
        assert masking_utils.find_packed_sequence_indices(packed) is None
    assert masking_utils.find_packed_sequence_indices(packed).tolist() == [[0, 0, 0, 1, 1]]
    asked.clear()
    step(LocalLLM(part()), [8, 3])
    assert not asked


def test_a_pass_that_is_recorded_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a CUDA graph is recorded transformers would make one, and attention take another way than before."""
    llm, masks = LocalLLM(part()), []
    attention = llm.part.decoder.layers[0].self_attn  # type: ignore[union-attr, index]
    attention.register_forward_pre_hook(
        lambda _module, _args, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    step(llm, [8, 8])
    assert masks == [None]


def test_a_decoder_that_cannot_be_recorded_is_told_at_the_start() -> None:
    llm, pools = recording()
    assert llm.passes.graphs is not None
    llm.passes.graphs.first()
    assert pools[0].sizes == [(1, 16, D)]
    pools[0].fails = True
    with pytest.raises(ConfigError, match=r"not permitted when stream is capturing.*leave out --cuda-graphs"):
        llm.passes.graphs.first()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler meets its own
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [[9], [16, 16], [20, 7, 20, 13, 2]])
def test_on_a_gpu(dtype: torch.dtype, compiled: bool, lengths: list[int]) -> None:
    def model(graphs: bool) -> LocalLLM:
        own = part()
        for module in (own.decoder, own.head):
            module.to("cuda", dtype)
        return LocalLLM(own, compiled=compiled, graphs=graphs)

    plain, recorded = model(False), model(True)
    for llm in (plain, recorded):
        llm.passes.warm_up()
    exact = LocalLLM(part())
    for seed in range(8):
        got, want = step(recorded, lengths, seed), step(plain, lengths, seed)
        true = step(exact, lengths, seed)
        for one, other, right in zip(got, want, true, strict=True):
            assert one is not None
            assert other is not None
            assert right is not None
            ours, theirs = ((x.cpu().float() - right).norm() / right.norm() for x in (one, other))
            assert ours <= 2 * theirs + 1e-6
    assert len(recorded.passes.graphs or ()) == len(
        {Size.of(1, 1, 64), Size.of(len(lengths), max(lengths), 64)}
    )
    assert recorded.passes.graphs is not None
    assert recorded.passes.graphs.held > 0
    assert recorded.passes.graphs.let_go()
    step(recorded, lengths)


@pytest.mark.gpu
def test_on_a_gpu_the_largest_size_decides_how_much_is_held() -> None:
    own = part()
    for module in (own.decoder, own.head):
        module.to("cuda")
    llm = LocalLLM(own, graphs=True)
    llm.passes.warm_up()
    graphs = llm.passes.graphs
    assert graphs is not None
    held = []
    for samples in (2000, 3000, 2500, 1500, 3000):
        for _ in range(3):
            step(llm, [60] * samples)
        held.append(graphs.held)
    assert len(graphs) == 5  # the first of all among them
    assert held[1] < 2 * held[0]  # of 3000, rather than of both
    assert held[-1] == held[1]


@pytest.mark.gpu
def test_on_a_gpu_beside_other_threads() -> None:
    """Other threads copy on streams of their own, allocate and let go while sizes are recorded."""
    own = part()
    for module in (own.decoder, own.head):
        module.to("cuda")
    llm, exact = LocalLLM(own, graphs=True), LocalLLM(part())
    llm.passes.warm_up()
    end, failed = threading.Event(), []

    def copy() -> None:
        stream = torch.cuda.Stream()
        try:
            while not end.is_set():
                with torch.cuda.stream(stream):
                    there = torch.randn(1000, 100).pin_memory().to("cuda", non_blocking=True)
                    back = (there + 1).to("cpu")
                    stream.synchronize()
                    assert torch.isfinite(back).all()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=copy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for length in range(2, 60, 6):
            for seed in range(5):
                for got, want in zip(
                    step(llm, [length, 3], seed), step(exact, [length, 3], seed), strict=True
                ):
                    torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert len(llm.passes.graphs or ()) > 3
