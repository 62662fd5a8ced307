"""Diagonal Fisher merging, as FedNano does it (arXiv 2506.14824; Matena and Raffel, arXiv 2111.09832).

``theta = sum_k w_k F_k theta_k / sum_k w_k F_k``, elementwise, with F_k the diagonal of client k's empirical
Fisher information (mean over its samples of the squared gradient of each sample's loss). Numerator and
denominator are both sums, so the rule streams and composes with secure aggregation.

Raw Fishers are no fair votes: they scale with the square of each client's loss, and most entries are next to
zero. So, per client:

1. *normalise*: divide by the mean over each leaf ("leaf"), over all leaves ("all"), or not at all ("none");
2. *floor and clip*: clamp to ``[floor, clip]``. In units of the mean when normalised: an element nobody has
   information about then becomes the plain weighted mean, and no element counts more than ``clip`` times the
   average one.

With equal Fishers the rule is FedAvg. As floor and clip approach each other it becomes FedAvg, too.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fednano.aggregation.fixedpoint import FixedSum, Grid
from fednano.aggregation.mean import require_resolution
from fednano.aggregation.reduce import nonnegative_sum
from fednano.aggregation.rule import Capability, Rule, Scalar, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Refusal, Update
from fednano.aggregation.weighted import add_weighted
from fednano.errors import ConfigError

__all__ = ["FisherMerge", "fisher_means"]


def fisher_means(update: Update, normalise: str) -> dict[str, float]:
    """What each leaf's Fisher is divided by.

    Args:
        update: with Fisher leaves of any shape, not negative.
        normalise: "leaf", "all" or "none".

    Returns:
        Name to mean; 0 for a leaf without any information, when normalised by leaf.

    Raises:
        Refusal: "fisher" when it is missing, negative, not finite, or zero throughout.
    """
    if update.fisher is None:
        raise Refusal("fisher", "no Fisher information was sent, and the rule needs it", update.client)
    sums, sizes = {}, {}
    for name, fisher in update.fisher.items():
        sums[name], sizes[name] = nonnegative_sum(fisher), max(fisher.numel(), 1)
        if math.isnan(sums[name]):
            raise Refusal("fisher", f"Fisher of {name} is negative or not finite", update.client)
    total, size = math.fsum(sums.values()), sum(sizes.values())
    if total <= 0.0:
        raise Refusal("fisher", "the Fisher is zero throughout", update.client)
    if normalise == "leaf":
        return {name: sums[name] / sizes[name] for name in sums}
    return dict.fromkeys(sums, total / size if normalise == "all" else 1.0)


@dataclass(frozen=True)
class FisherMerge(Rule):
    """Mean weighted by each element's Fisher information.

    Attributes:
        normalise: "leaf", "all" or "none": over what a client's Fisher is given mean 1.
        floor: smallest weight of an element, relative to the mean.
        clip: largest weight of an element, relative to the mean.
    """

    normalise: str = "all"
    floor: float = 0.05
    clip: float = 32.0

    name: ClassVar[str] = "fisher"
    capability: ClassVar[Capability] = Capability(
        summary="mean weighted by each element's diagonal Fisher information (FedNano)",
        paper="2111.09832",
        exact=frozenset({"affine"}),
        exact_note="the Fisher-weighted optimum for affine adapters, under a diagonal quadratic loss of each client",
        bytes_up="2 in fp32, 1.25 with the 8-bit Fisher",
        needs=frozenset({"fisher"}),
    )

    def __post_init__(self) -> None:
        if self.normalise not in ("leaf", "all", "none"):
            raise ConfigError(f"fisher: got normalise={self.normalise!r}, expected 'leaf', 'all' or 'none'")
        if not (0.0 < self.floor <= self.clip < math.inf):
            raise ConfigError(
                f"fisher: got floor={self.floor}, clip={self.clip}, expected 0 < floor <= clip < infinity"
            )

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """Asks the client for its Fisher."""
        return {"fisher": True}

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
        shapes = {name: spec.leaves[name].shape for name in self.travelling(spec, round)}
        # The clamp rounds to the Fisher's dtype, so a term may pass the clip by that much.
        bound = spec.max_weight * self.clip * 1.001
        state.sums["denominator"] = FixedSum(Grid.covering(bound, spec.max_clients), shapes)
        state.sums["numerator"] = FixedSum(Grid.covering(bound * spec.max_abs, spec.max_clients), shapes)
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        numerator, denominator = state.sums["numerator"], state.sums["denominator"]
        require_resolution(numerator.grid, update.weight * self.floor, update.client)
        means = fisher_means(update, self.normalise)
        factors, clamps = {}, {}
        for name, mean in means.items():
            # A leaf without any information (its gradient is zero throughout) votes with the floor.
            scale = mean if mean > 0.0 else 1.0
            factors[name], clamps[name] = update.weight / scale, (self.floor * scale, self.clip * scale)
        assert update.fisher is not None
        add_weighted(
            numerator, denominator, update.leaves, update.fisher, factors, clamps, state.spec.max_abs
        )
        state.count(update)
        return state

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        numerator, denominator = state.sums["numerator"], state.sums["denominator"]
        merged = {n: numerator.ratio(n, denominator, state.spec.leaves[n].dtype) for n in numerator.shapes}
        return {**(state.current or {}), **merged}
