"""Weighted means of leaves: FedAvg and FedProx.

FedAvg (arXiv 1602.05629) is ``theta = sum_k w_k theta_k / sum_k w_k``. FedProx (arXiv 1812.06127) is FedAvg on
the server; the client adds ``mu / 2 * |theta - theta_global|**2`` to its loss.

The mean of leaves is the mean of deltas only for affine adapters: the mean of ``B_k`` times the mean of ``A_k``
is not the mean of ``B_k A_k``.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fednano.aggregation.fixedpoint import FixedSum, Grid
from fednano.aggregation.rule import Capability, Rule, Scalar, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Refusal, Update
from fednano.errors import ConfigError

__all__ = ["FedAvg", "FedProx", "MeanRule", "mean_sum", "require_resolution"]

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
class FedAvg(MeanRule):
    """Weighted mean of the leaves (arXiv 1602.05629)."""

    name: ClassVar[str] = "fedavg"
    capability: ClassVar[Capability] = Capability(
        summary="weighted mean of the leaves",
        paper="1602.05629",
        exact=_AFFINE,
        exact_note="the mean of the deltas of affine adapters; of products only to first order in the clients' moves",
    )


@dataclass(frozen=True)
class FedProx(MeanRule):
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
        if not 0.0 <= self.mu < float("inf"):
            raise ConfigError(f"fedprox: got mu={self.mu}, expected a number that is not negative")

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """``proximal_mu`` for the client's loss."""
        return {"proximal_mu": self.mu}
