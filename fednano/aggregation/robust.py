"""Rules that survive clients which send anything: Krum, Multi-Krum, coordinate median, trimmed mean, Bulyan.

Krum and Multi-Krum: arXiv 1703.02757. Median and trimmed mean: arXiv 1803.01498. Bulyan: arXiv 1802.07927.
Distances are those of `distances`, in product space by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.distances import check_space, gram_matrix, krum_scores, lowest, squared_distances
from fednano.aggregation.products import HeldRule, shares, sum_of
from fednano.aggregation.rule import Capability, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Update
from fednano.errors import ConfigError, RunError

__all__ = ["Bulyan", "Krum", "Median", "MultiKrum", "TrimmedMean", "combined", "robust_capability"]


def combined(spec: Spec, updates: Sequence[Update], weights: Sequence[float]) -> Leaves:
    """Sum of the updates' leaves, times weights."""
    return {
        name: sum_of([w * u.leaves[name].double() for w, u in zip(weights, updates, strict=True)]).to(
            spec.leaves[name].dtype
        )
        for name in updates[0].leaves
    }


def robust_capability(
    summary: str, paper: str, note: str, needs_all: bool = True, coordinates: bool = False
) -> Capability:
    """What the robust rules have in common: no sum shows the server enough.

    Args:
        summary: one line.
        paper: arXiv id.
        note: what is computed.
        needs_all: whether all updates are held at once.
        coordinates: whether clients are compared coordinate by coordinate.
    """
    return Capability(
        summary=summary,
        paper=paper,
        exact=frozenset(),
        exact_note=note,
        streaming=not needs_all,
        secure_aggregation=False,
        differential_privacy=not needs_all,
        codecs_refused=frozenset({"topk"}) if coordinates else frozenset(),
        codecs_note="most clients send nothing at a coordinate, so the middle of them is no change at all"
        if coordinates
        else "",
    )


def _check(name: str, space: str, malicious: int) -> None:
    check_space(name, space)
    if malicious < 0:
        raise ConfigError(f"{name}: got malicious={malicious}, expected 0 or more")


@dataclass(frozen=True)
class MultiKrum(HeldRule):
    """Weighted mean of the updates with the lowest Krum scores.

    Attributes:
        malicious: f, how many clients may be malicious.
        keep: how many updates are averaged; 0: all but f.
        space: where distances are taken, "product" or "leaves".
    """

    malicious: int = 1
    keep: int = 0
    space: str = "product"

    name: ClassVar[str] = "multikrum"
    capability: ClassVar[Capability] = robust_capability(
        "mean of the updates nearest to their neighbours", "1703.02757", "FedAvg of the selected updates"
    )

    def __post_init__(self) -> None:
        _check(self.name, self.space, self.malicious)
        if self.keep < 0:
            raise ConfigError(f"{self.name}: got keep={self.keep}, expected 0 (all but f) or more")

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`. ``state.report["too_few"]`` is 1 when ``n < 2 f + 3``, where Krum guarantees nothing."""
        state.require_updates()
        updates = state.in_order()
        n = len(updates)
        state.report["too_few"] = float(n < 2 * self.malicious + 3)
        scores = krum_scores(squared_distances(gram_matrix(state.spec, updates, self.space)), self.malicious)
        chosen = lowest(scores, min(self.keep, n) if self.keep else max(1, n - self.malicious))
        state.report["selected"] = float(len(chosen))
        kept = [updates[i] for i in chosen]
        return {**(state.current or {}), **combined(state.spec, kept, shares(kept))}


@dataclass(frozen=True)
class Krum(MultiKrum):
    """The one update with the lowest Krum score."""

    keep: int = 1

    name: ClassVar[str] = "krum"
    capability: ClassVar[Capability] = robust_capability(
        "the one update nearest to its neighbours", "1703.02757", "one client's adapter, unchanged"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep != 1:
            raise ConfigError(f"krum keeps one update, got keep={self.keep}; use multikrum to keep more")


@dataclass(frozen=True)
class Median(HeldRule):
    """Median of each coordinate, unweighted."""

    name: ClassVar[str] = "median"
    capability: ClassVar[Capability] = robust_capability(
        "median of each coordinate", "1803.01498", "coordinate-wise medians of the leaves", coordinates=True
    )

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        updates = state.in_order()
        return {
            **(state.current or {}),
            **{n: _middle(_stack(updates, n), state.spec, n) for n in updates[0].leaves},
        }


def _stack(updates: Sequence[Update], name: str) -> Tensor:
    return torch.stack([u.leaves[name] for u in updates])


def _middle(stacked: Tensor, spec: Spec, name: str) -> Tensor:
    ordered = stacked.double().sort(dim=0).values
    n = ordered.shape[0]
    return ((ordered[(n - 1) // 2] + ordered[n // 2]) / 2).to(spec.leaves[name].dtype)


@dataclass(frozen=True)
class TrimmedMean(HeldRule):
    """Mean of each coordinate without its extremes, unweighted.

    Attributes:
        beta: share cut off at each end, below one half.
    """

    beta: float = 0.2

    name: ClassVar[str] = "trimmed"
    capability: ClassVar[Capability] = robust_capability(
        "mean of each coordinate without its extremes",
        "1803.01498",
        "coordinate-wise trimmed means of the leaves",
        coordinates=True,
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 0.5:
            raise ConfigError(f"trimmed: got beta={self.beta}, expected at least 0 and below 0.5")

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        updates = state.in_order()
        cut, out = int(self.beta * len(updates)), dict(state.current or {})
        for name in updates[0].leaves:
            ordered = _stack(updates, name).double().sort(dim=0).values[cut : len(updates) - cut]
            out[name] = ordered.mean(dim=0).to(state.spec.leaves[name].dtype)
        return out


@dataclass(frozen=True)
class Bulyan(HeldRule):
    """Multi-Krum selects ``n - 2 f``; each coordinate is the mean of their ``n - 4 f`` values nearest the median.

    Attributes:
        malicious: f; at least ``4 f + 3`` updates are needed.
        space: where distances are taken, "product" or "leaves".
    """

    malicious: int = 1
    space: str = "product"

    name: ClassVar[str] = "bulyan"
    capability: ClassVar[Capability] = robust_capability(
        "Krum selection, then each coordinate's values nearest the median",
        "1802.07927",
        "coordinate-wise means of selected values",
        coordinates=True,
    )

    def __post_init__(self) -> None:
        _check(self.name, self.space, self.malicious)

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`. Raises RunError with fewer than ``4 f + 3`` updates."""
        state.require_updates()
        updates, f = state.in_order(), self.malicious
        n = len(updates)
        if n < 4 * f + 3:
            raise RunError(
                f"bulyan: {n} updates against {f} malicious ones, expected at least {4 * f + 3}; lower malicious"
            )
        scores = krum_scores(squared_distances(gram_matrix(state.spec, updates, self.space)), f)
        chosen = [updates[i] for i in lowest(scores, n - 2 * f)]
        keep, out = n - 4 * f, dict(state.current or {})
        for name in chosen[0].leaves:
            values = _stack(chosen, name).double()
            middle = _middle(values, state.spec, name).double()
            nearest = (values - middle).abs().argsort(dim=0, stable=True)[:keep]
            out[name] = values.gather(0, nearest).mean(dim=0).to(state.spec.leaves[name].dtype)
        return out
