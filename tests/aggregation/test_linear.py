"""Sums of clients' integer vectors are merges, to the bit: what secure aggregation relies on."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fednano.aggregation import Refusal, create_rule, layout_of, read_sum, rule_class, rule_names, vector_of
from fednano.aggregation.linear import LIMBS, _limbs, _number

SUMS = [name for name in rule_names() if rule_class(name).capability.secure_aggregation]


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("round", [1, 2])
def test_the_sum_of_vectors_is_the_merge(name: str, round: int, make_spec: Any, make_updates: Any) -> None:  # noqa: A002
    rule, spec = create_rule(name), make_spec(dtype=torch.float32)
    updates = make_updates(spec, clients=6, fisher=True)
    current = make_updates(spec, clients=1, seed=9)[0].leaves
    travelling = rule.travelling(spec, round)
    for update in updates:
        for part in (update.leaves, update.fisher):
            for leaf in set(part) - set(travelling):
                del part[leaf]
    plain = rule.init(spec, current=current, round=round)
    for update in updates:
        plain = rule.add(plain, update)
    layout = layout_of(rule, spec, current, round=round, extra=("loss",))
    total = np.zeros(layout.length, np.uint64)
    for update in reversed(updates):
        loss = {"loss": update.metrics["loss"]}
        total += vector_of(layout, rule, spec, current, update, round=round, extra=loss)
    hidden = rule.init(spec, current=current, round=round)
    rest = read_sum(layout, total, rule, hidden, [update.client for update in updates])
    expected, merged = rule.finish(plain), rule.finish(hidden)
    assert set(expected) == set(merged)
    assert all(torch.equal(leaf, merged[leaf_name]) for leaf_name, leaf in expected.items())
    memory, again = rule.memory(plain), rule.memory(hidden)
    assert set(memory) == set(again)
    assert all(torch.equal(tensor, again[key]) for key, tensor in memory.items())
    assert rest["loss"] == pytest.approx(sum(update.metrics["loss"] for update in updates), rel=1e-15)


@given(st.lists(st.floats(min_value=2.0**-100, max_value=2.0**90), min_size=1, max_size=20))
def test_scalars_add_up_exactly(values: list[float]) -> None:
    total = np.zeros(LIMBS, np.uint64)
    for value in values:
        total += _limbs(Fraction(value), "x", "c")
    assert _number(total) == sum((Fraction(value) for value in values), Fraction(0))


@pytest.mark.parametrize("value", [-1.0, 2.0**97, 2.0**-170])
def test_scalars_that_do_not_fit_are_refused(value: float) -> None:
    with pytest.raises(Refusal, match="256 bits"):
        _limbs(Fraction(value), "x", "c")


def test_a_sum_of_another_shape_or_without_weight_is_refused(make_spec: Any, make_updates: Any) -> None:
    rule, spec = create_rule("fedavg"), make_spec()
    layout = layout_of(rule, spec, {})
    with pytest.raises(Refusal, match="words"):
        read_sum(layout, np.zeros(3, np.uint64), rule, rule.init(spec), ["a"])
    with pytest.raises(Refusal, match="not positive"):
        read_sum(layout, np.zeros(layout.length, np.uint64), rule, rule.init(spec), ["a"])
    with pytest.raises(Refusal, match="admits 64"):
        read_sum(
            layout, np.zeros(layout.length, np.uint64), rule, rule.init(spec), [str(n) for n in range(65)]
        )
