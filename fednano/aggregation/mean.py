"""Weighted means of leaves: FedAvg and FedProx.

FedAvg (arXiv 1602.05629) is ``theta = sum_k w_k theta_k / sum_k w_k``. FedProx (arXiv 1812.06127) is FedAvg on
the server; the client adds ``mu / 2 * |theta - theta_global|**2`` to its loss.

The mean of leaves is the mean of deltas only for affine adapters: the mean of ``B_k`` times the mean of ``A_k``
is not the mean of ``B_k A_k``.

Both take a server learning rate: ``theta + server_lr (mean - theta)``. Other rules take it through a server optimiser
over them, such as FedAvgM with ``beta=0``.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fednano.aggregation.fixedpoint import FixedSum, Grid
from fednano.aggregation.rule import Capability, Rule, Scalar, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Refusal, Update
from fednano.errors import ConfigError

__all__ = [
    "FedAvg",
    "FedProx",
    "MeanRule",
    "SteppedMean",
    "check_server_lr",
    "mean_sum",
    "moved",
    "require_resolution",
]

_AFFINE = frozenset({"affine"})


def mean_sum(spec: Spec, names: tuple[str, ...]) -> FixedSum:
    """An accumulator for ``sum_k w_k theta_k`` within the bounds of the specification."""
    grid = Grid.covering(spec.max_abs * spec.max_weight, spec.max_clients)
    return FixedSum(grid, {name: spec.leaves[name].shape for name in names})


def require_resolution(grid: Grid, factor: float, client: str) -> None:
    """Refuse a factor so small that the grid would leave it fewer than 10 bits."""
    if factor < 1024.0 * grid.step:
        raise Refusal(
            "weight",
            f"a factor of {factor:.3g} is lost on a grid of step {grid.step:.3g}; "
            "lower max_weight or max_abs, or scale the weights up",
            client,
        )


def check_server_lr(rule: str, rate: float) -> None:
    """ConfigError unless a server's learning rate is a positive number."""
    if not 0.0 < rate < math.inf:
        raise ConfigError(f"{rule}: got server_lr={rate}, expected a positive number")


def moved(current: Leaves, merged: Leaves, rate: float) -> Leaves:
    """``current + rate (merged - current)`` in the dtypes of ``merged``; the very same leaves at rate 1.

    Args:
        current: name to leaf, at least those of ``merged``.
        merged: name to leaf.
        rate: the server's learning rate.
    """
    if rate == 1.0:
        return merged
    out = {}
    for name, leaf in merged.items():
        base = current[name].double()
        out[name] = (base + rate * (leaf.double() - base)).to(leaf.dtype)
    return out


class MeanRule(Rule):
    """The streaming weighted mean of whatever travels; leaves that do not travel keep their current value."""

    def init(
        self,
        spec: Spec,
        *,
        current: Leaves | None = None,
        memory: Leaves | None = None,
        round: int = 0,
    ) -> State:
        """See `Rule.init`."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.sums["mean"] = mean_sum(spec, self.travelling(spec, round))
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        require_resolution(state.sums["mean"].grid, update.weight, update.client)
        state.sums["mean"].add(update.leaves, update.weight)
        state.count(update)
        return state

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        total = float(state.weight)
        mean = state.sums["mean"]
        merged = {name: mean.drain(name, total, state.spec.leaves[name].dtype) for name in mean.shapes}
        return {**(state.current or {}), **merged}


@dataclass(frozen=True)
class SteppedMean(MeanRule):
    """The mean, and a server learning rate.

    Attributes:
        server_lr: how far to go from the current leaves towards the mean; above 1 is beyond it.
    """

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        check_server_lr(self.name, self.server_lr)

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed at any learning rate but 1."""
        state = super().init(spec, current=current, memory=memory, round=round)
        if self.server_lr != 1.0:
            state.require_current(self.name)
        return state

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        merged = super().finish(state)
        if self.server_lr == 1.0:
            return merged
        travelled = {name: merged[name] for name in state.sums["mean"].shapes}
        return {**merged, **moved(state.require_current(self.name), travelled, self.server_lr)}


@dataclass(frozen=True)
class FedAvg(SteppedMean):
    """Weighted mean of the leaves (arXiv 1602.05629)."""

    name: ClassVar[str] = "fedavg"
    capability: ClassVar[Capability] = Capability(
        summary="weighted mean of the leaves",
        paper="1602.05629",
        exact=_AFFINE,
        exact_note="the mean of the deltas of affine adapters; of products only to first order in the clients' moves",
    )


@dataclass(frozen=True)
class FedProx(SteppedMean):
    """FedAvg whose clients stay near the global adapter (arXiv 1812.06127).

    Attributes:
        mu: strength of the client's term ``mu / 2 * |theta - theta_global|**2``.
    """

    mu: float = 0.01

    name: ClassVar[str] = "fedprox"
    capability: ClassVar[Capability] = Capability(
        summary="FedAvg; clients add mu/2 |theta - theta_global|^2 to their loss",
        paper="1812.06127",
        exact=_AFFINE,
        exact_note="as FedAvg",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.mu < math.inf:
            raise ConfigError(f"fedprox: got mu={self.mu}, expected a number that is not negative")

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """``proximal_mu`` for the client's loss."""
        return {"proximal_mu": self.mu}
