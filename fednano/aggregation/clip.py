"""FedAvg of changes clipped to a norm: the simplest bound on what one client can do (arXiv 1911.07963)."""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from fednano.aggregation.mean import MeanRule, require_resolution
from fednano.aggregation.reduce import sum_of_squares
from fednano.aggregation.rule import Capability, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Refusal, Update
from fednano.errors import ConfigError

__all__ = ["NormClip"]


@dataclass(frozen=True)
class NormClip(MeanRule):
    """FedAvg of changes clipped to a norm: ``theta + sum_k w_k min(1, bound / |d_k|) d_k / sum_k w_k``.

    Attributes:
        bound: on the Euclidean norm of a client's change over all leaves.
    """

    bound: float = 1.0

    name: ClassVar[str] = "normclip"
    capability: ClassVar[Capability] = Capability(
        summary="FedAvg of changes clipped to a norm",
        paper="1911.07963",
        exact=frozenset(),
        exact_note="the mean of the clipped changes of the leaves",
        secure_aggregation=False,
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.bound < math.inf:
            raise ConfigError(f"normclip: got bound={self.bound}, expected a positive number")

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.require_current(self.name)
        state.numbers["clipped"] = Fraction(0)
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        current, square = state.require_current(self.name), 0.0
        for name in state.sums["mean"].shapes:
            square += sum_of_squares(update.leaves[name].double() - current[name].double())
        if not math.isfinite(square):
            raise Refusal("nonfinite", "the change holds NaN or infinity", update.client)
        factor = update.weight * min(1.0, self.bound / math.sqrt(square)) if square > 0.0 else update.weight
        require_resolution(state.sums["mean"].grid, factor, update.client)
        state.sums["mean"].add(update.leaves, factor)
        state.numbers["clipped"] += Fraction(factor)
        state.report["clipped"] = state.report.get("clipped", 0.0) + float(factor < update.weight)
        state.count(update)
        return state

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        current, out = state.require_current(self.name), {}
        share = float(state.numbers["clipped"] / state.weight)
        for name in state.sums["mean"].shapes:
            base = current[name].double()
            mean = state.sums["mean"].value(name, float(state.weight))
            out[name] = (base * (1.0 - share) + mean).to(state.spec.leaves[name].dtype)
        return {**current, **out}
