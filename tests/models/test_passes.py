"""Passes in parts, with checkpoints and compiled, against the whole batch at once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from fednano.models import blocks
from fednano.models.language import IGNORE, LanguagePart, LocalLLM
from fednano.models.memory import Cost, plan

D, V, POSITIONS = 32, 61, 64


def part() -> LanguagePart:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=V,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,
    )
    head = torch.nn.Linear(D, V, bias=False)
    return LanguagePart(LlamaModel(config), head, D, V, POSITIONS, (2,), 0, "none")


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    labels = torch.where(mask, torch.randint(V, mask.shape, generator=g), IGNORE)
    return torch.randn(*mask.shape, D, generator=g), mask, labels


class Small:
    """A device with so many bytes, on which a pass over n tokens takes ``1000 + 100 n``, with checkpoints 10 n."""

    def __init__(self, total: int) -> None:
        self.total, self.passes = total, 0

    def free(self) -> int:
        return self.total

    def start(self) -> None:
        self.passes += 1

    def taken(self) -> int:
        return 0


def limited(total: int) -> tuple[LocalLLM, list[tuple[int, int]]]:
    """A model with little memory, and the (samples, checkpointed blocks) of each of its passes."""
    llm = LocalLLM(part(), memory=Small(total))
    llm.passes._cost = Cost(1000, 100, 10)
    seen: list[tuple[int, int]] = []
    forward = LlamaModel.forward

    def watched(self: LlamaModel, *, inputs_embeds: Tensor, **rest: Any) -> Any:
        seen.append((len(inputs_embeds), getattr(blocks._HERE, "count", 0)))
        return forward(self, inputs_embeds=inputs_embeds, **rest)

    llm.part.decoder.forward = functools.partial(watched, llm.part.decoder)
    return llm, seen


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (10**6, [(5, 0)]),
        (6_000, [(2, 0), (2, 0), (1, 0)]),  # 20 tokens a sample: two samples fit
        (2_700, [(1, 1)] * 5),  # one does not quite fit
        (1_600, [(1, 3)] * 5),
    ],
)
def test_parts_and_checkpoints_change_nothing(total: int, expected: list[tuple[int, int]]) -> None:
    inputs = batch([20, 7, 20, 13, 2])
    whole = LocalLLM(part()).loss_and_gradient(*inputs, "cross_entropy", True)
    llm, seen = limited(total)
    cut = llm.loss_and_gradient(*inputs, "cross_entropy", True)
    assert seen == expected
    for got, want in zip(cut, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_a_sample_that_cannot_fit_is_told() -> None:
    llm, _ = limited(1_100)
    with pytest.raises(MemoryError, match="a sample of 20 tokens needs"):
        llm.loss_and_gradient(*batch([20]), "cross_entropy", True)


def test_memory_that_runs_out_after_all_makes_the_parts_smaller() -> None:
    llm, seen = limited(10**6)
    forward = llm.part.decoder.forward

    def small(*, inputs_embeds: Tensor, **rest: Any) -> Any:
        if len(inputs_embeds) > 2:
            raise torch.OutOfMemoryError("too much")
        return forward(inputs_embeds=inputs_embeds, **rest)

    llm.part.decoder.forward = small
    inputs = batch([20, 7, 20, 13, 2])
    cut = llm.loss_and_gradient(*inputs, "cross_entropy", True)
    whole = LocalLLM(part()).loss_and_gradient(*inputs, "cross_entropy", True)
    assert max(samples for samples, _ in seen) <= 2
    for got, want in zip(cut, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)

    llm.part.decoder.forward = lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("never enough"))
    with pytest.raises(torch.OutOfMemoryError, match="does not fit"):
        llm.loss_and_gradient(*inputs, "cross_entropy", True)


def test_warming_up_measures_what_a_token_takes() -> None:
    llm = LocalLLM(part(), memory=(memory := Small(10**6)))
    llm.passes.warm_up()
    assert memory.passes == 6
    assert llm.passes._cost is not None


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=40),
    free=st.integers(0, 10**6),
    blocks_=st.integers(0, 40),
)
def test_every_plan_fits_and_takes_each_sample_once(lengths: list[int], free: int, blocks_: int) -> None:
    cost = Cost(1_000, 900, 70)
    try:
        parts = plan(lengths, cost, free, blocks_)
    except MemoryError:
        least = cost.per_token_checkpointed if blocks_ else cost.per_token
        assert cost.fixed + least * max(lengths) > 0.9 * free
        return
    assert [i for part in parts for i in range(*part.rows.indices(len(lengths)))] == list(range(len(lengths)))
    for one in parts:
        tokens = max(lengths) * (one.rows.stop - one.rows.start)
        share = one.checkpoints / blocks_ if blocks_ else 0.0
        per_token = cost.per_token - share * (cost.per_token - cost.per_token_checkpointed)
        assert cost.fixed + per_token * tokens <= free


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at every attribute there is
def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LocalLLM(part())
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = LocalLLM(part(), compiled=True)
    for lengths in ([9], [4, 17], [30, 30, 8]):
        inputs = batch(lengths)
        for got, want in zip(
            compiled.loss_and_gradient(*inputs, "cross_entropy", True),
            whole.loss_and_gradient(*inputs, "cross_entropy", True),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
