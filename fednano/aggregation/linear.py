"""A rule's part of one client as a vector of integers, such that the sum of the vectors is the merge.

What a sum-type rule keeps of a round are `FixedSum`s of leaves and exact scalar sums (of weights, say). Both are
additive: the state after two updates is the sum of the states after one each. So a client can run `Rule.add` on its own
update alone and send the integers; whoever adds them up, modulo 2**64, restores the state and calls `Rule.finish`. The
merged adapter then has the bits of the merge of the updates themselves. Secure aggregation masks these vectors.

**Words.** First the sums of the leaves in steps of their grids, by purpose and leaf; then each scalar sum, and the
weight, in `LIMBS` words of `LIMB_BITS` bits, as a multiple of ``2**-FRACTION_BITS``.

**No overflow.** For leaves see `fixedpoint`. A limb of one client is below 2**32, so the sum over fewer than 2**31
clients is below 2**63; limbs are added without carrying and carried once when they are read. A scalar is a double that
is 0 or has an absolute value from 2**-107 to 2**95, so its 53 bits lie between 2**-160 and 2**96: exact.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from fednano.aggregation.chunks import U64
from fednano.aggregation.rule import Rule, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Refusal, Update

__all__ = ["FRACTION_BITS", "LIMBS", "LIMB_BITS", "Layout", "layout_of", "read_sum", "vector_of"]

LIMBS, LIMB_BITS, FRACTION_BITS = 8, 32, 160


@dataclass(frozen=True)
class Layout:
    """What stands where in the vectors of one round.

    Attributes:
        leaves: purpose, leaf and size of each sum of leaves, in order.
        numbers: names of the scalar sums after them, the weight first.
    """

    leaves: tuple[tuple[str, str, int], ...]
    numbers: tuple[str, ...]

    @property
    def length(self) -> int:
        """Words of a vector."""
        return sum(size for _, _, size in self.leaves) + LIMBS * len(self.numbers)


def layout_of(
    rule: Rule, spec: Spec, current: Leaves, *, round: int = 0, extra: Sequence[str] = ()
) -> Layout:
    """The layout of a rule's vectors: the same wherever it is computed.

    Args:
        rule: one whose ``capability.secure_aggregation`` is true.
        spec: of the global adapter.
        current: the global leaves; only their shapes count.
        round: decides which leaves travel.
        extra: further scalar sums, such as that of losses.
    """
    state = rule.init(spec, current=current, round=round)
    leaves = tuple(
        (purpose, name, math.prod(shape))
        for purpose, total in state.sums.items()
        for name, shape in total.shapes.items()
    )
    names = rule.travelling(spec, round)
    probe = Update(
        client="probe",
        round=round,
        weight=1.0,
        leaves={n: torch.zeros(spec.leaves[n].shape, dtype=spec.leaves[n].dtype) for n in names},
        fisher={n: torch.ones(spec.leaves[n].shape) for n in names},
        metrics={"steps": 1.0, "lr": 1.0, "loss": 1.0},
    )
    numbers = sorted(rule.add(state, probe).numbers)
    return Layout(leaves, ("weight", *(f"rule/{name}" for name in numbers), *extra))


def vector_of(
    layout: Layout,
    rule: Rule,
    spec: Spec,
    current: Leaves,
    update: Update,
    *,
    round: int = 0,
    extra: Mapping[str, float] | None = None,
) -> U64:
    """One client's vector.

    Args:
        layout: of the round.
        rule: the rule.
        spec: of the global adapter.
        current: the global leaves; only their shapes count.
        update: validated.
        round: the round.
        extra: further numbers, named in the layout; not negative.

    Returns:
        ``(layout.length,)`` words.

    Raises:
        Refusal: by the rule, or for a number that 256 bits cannot hold exactly.
    """
    state = rule.add(rule.init(spec, current=current, round=round), update)
    parts = []
    integers = {purpose: total.integers() for purpose, total in state.sums.items()}
    for purpose, name, _ in layout.leaves:
        parts.append(integers[purpose][name].reshape(-1).numpy().view(np.uint64))
    own = {"weight": state.weight, **{f"rule/{name}": number for name, number in state.numbers.items()}}
    own |= {name: Fraction(number) for name, number in (extra or {}).items()}
    for name in layout.numbers:
        parts.append(_limbs(own.get(name, Fraction(0)), name, update.client))
    return np.concatenate(parts)


def read_sum(
    layout: Layout, total: U64, rule: Rule, state: State, clients: Collection[str]
) -> dict[str, float]:
    """Put a sum of vectors into a fresh state of the rule, as if the updates had been added to it.

    Args:
        layout: of the round.
        total: ``(layout.length,)`` words.
        rule: the rule.
        state: fresh from ``rule.init``.
        clients: whose vectors are in the sum.

    Returns:
        The further scalar sums by name.

    Raises:
        Refusal: the sum has another length, or no weight.
    """
    if total.shape != (layout.length,):
        raise Refusal("schema", f"a sum of {total.shape} words, expected {layout.length}")
    start, integers = 0, {purpose: dict[str, U64]() for purpose in state.sums}
    for purpose, name, size in layout.leaves:
        integers[purpose][name] = total[start : start + size]
        start += size
    for purpose, summed in state.sums.items():
        summed.restore(integers[purpose], len(clients))
    rest = {}
    for name in layout.numbers:
        number = _number(total[start : start + LIMBS])
        start += LIMBS
        if name == "weight":
            state.weight = number
        elif name.startswith("rule/"):
            state.numbers[name.removeprefix("rule/")] = number
        else:
            rest[name] = float(number)
    for client in clients:
        state.clients.add(client)
    if state.weight <= 0:
        raise Refusal("weight", "the sum of the weights is not positive: a client's vector was none")
    return rest


def _limbs(number: Fraction, name: str, client: str) -> U64:
    scaled = number * (1 << FRACTION_BITS)
    if scaled.denominator != 1 or not 0 <= scaled.numerator < 1 << (LIMBS * LIMB_BITS):
        raise Refusal("metric", f"{name} is {float(number):.6g}, which no sum of 256 bits can hold", client)
    whole = scaled.numerator
    return np.array(
        [(whole >> (LIMB_BITS * i)) & ((1 << LIMB_BITS) - 1) for i in range(LIMBS)], dtype=np.uint64
    )


def _number(limbs: U64) -> Fraction:
    whole = sum(int(limb) << (LIMB_BITS * i) for i, limb in enumerate(limbs))
    return Fraction(whole, 1 << FRACTION_BITS)
