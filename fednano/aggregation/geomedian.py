"""The geometric median of updates (arXiv 1912.13445): half of the weight must lie to move it far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.distances import check_space, gram_matrix
from fednano.aggregation.products import HeldRule, merged_products
from fednano.aggregation.robust import combined, robust_capability
from fednano.aggregation.rule import Capability, State
from fednano.aggregation.update import Leaves
from fednano.errors import ConfigError

__all__ = ["GeometricMedian"]


@dataclass(frozen=True)
class GeometricMedian(HeldRule):
    """The point with the least weighted sum of distances to all updates, by smoothed Weiszfeld steps.

    It is a convex combination of the updates, so every step happens in the ``(n, n)`` Gram matrix. In product
    space the combination is merged as products, so ranks and scales may differ.

    Attributes:
        space: "product" or "leaves".
        steps: Weiszfeld steps at most.
        smoothing: smallest distance that counts, relative to the median distance to the mean.
        tolerance: stop when no share moves by more.
    """

    space: str = "leaves"
    steps: int = 200
    smoothing: float = 1e-6
    tolerance: float = 1e-12

    name: ClassVar[str] = "geomedian"
    capability: ClassVar[Capability] = robust_capability(
        "the point with the least sum of distances to all updates",
        "1912.13445",
        "a convex combination of the updates",
    )

    def __post_init__(self) -> None:
        check_space(self.name, self.space)
        if self.steps < 1 or not 0.0 < self.smoothing < 1.0 or self.tolerance < 0.0:
            raise ConfigError(
                f"geomedian: got steps={self.steps}, smoothing={self.smoothing}, tolerance={self.tolerance}, "
                "expected steps >= 1, 0 < smoothing < 1, tolerance >= 0"
            )

    def shares(self, gram: Tensor, weights: Sequence[float]) -> list[float]:
        """The convex combination of the updates that is their geometric median.

        Args:
            gram: inner products ``(n, n)``.
            weights: of the updates.
        """
        alpha = torch.tensor(list(weights), dtype=torch.float64)
        alpha = alpha / alpha.sum()
        share, floor = alpha.clone(), 0.0
        for step in range(self.steps):
            distance = (gram.diagonal() - 2.0 * gram @ share + share @ gram @ share).clamp_min(0.0).sqrt()
            if step == 0:
                floor = self.smoothing * float(distance.median())
                if floor == 0.0:  # at least half of the updates are the mean itself
                    floor = self.smoothing * float(distance.max())
                if floor == 0.0:
                    break
            fresh = alpha / distance.clamp_min(floor)
            fresh = fresh / fresh.sum()
            moved = float((fresh - share).abs().max())
            share = fresh
            if moved <= self.tolerance:
                break
        return [float(v) for v in share]

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        spec, updates = state.spec, state.in_order()
        share = self.shares(gram_matrix(spec, updates, self.space), [u.weight for u in updates])
        state.report["largest_share"] = max(share)
        if self.space == "product" and spec.products:
            merged, report = merged_products(spec, updates, share, state.current)
            state.report.update(report)
            return merged
        return {**(state.current or {}), **combined(spec, updates, share)}
