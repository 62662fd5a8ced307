"""Merging of sparse changes: TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099).

Both work on each client's change from the current leaves, in factor space. TIES keeps each client's largest
entries, elects a sign per entry, and averages only the clients that agree. DARE drops entries at random and
scales the rest up, so the expected change is kept; it is a sum and streams.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.fixedpoint import FixedSum
from fednano.aggregation.mean import MeanRule, mean_sum, require_resolution
from fednano.aggregation.products import HeldRule
from fednano.aggregation.rule import Capability, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Update
from fednano.errors import ConfigError

__all__ = ["Dare", "DareTies", "Ties", "dare_mask", "elect", "trim"]


def trim(change: Tensor, density: float) -> Tensor:
    """Keep the largest ``density`` of the entries by absolute value, at least one; ties go to the earlier entry.

    Args:
        change: any shape.
        density: in (0, 1].
    """
    flat = change.reshape(-1)
    keep = max(1, int(density * flat.numel()))
    if keep >= flat.numel():
        return change
    kept = flat.abs().argsort(descending=True, stable=True)[:keep]
    out = torch.zeros_like(flat)
    out[kept] = flat[kept]
    return out.reshape(change.shape)


def elect(changes: Tensor, weights: Tensor) -> Tensor:
    """The mean, per entry, of the clients whose sign is the sign of the weighted sum.

    Args:
        changes: ``(clients, ...)``, zero where trimmed.
        weights: ``(clients,)``, positive.
    """
    shaped = weights.reshape(-1, *([1] * (changes.ndim - 1)))
    weighted = changes * shaped
    sign = torch.where(weighted.sum(dim=0) >= 0.0, 1.0, -1.0)
    agree = (changes.sign() == sign).double()
    return (weighted * agree).sum(dim=0) / (shaped * agree).sum(dim=0).clamp_min(1e-300)


def dare_mask(shape: Sequence[int], density: float, key: str) -> Tensor:
    """Which entries are kept, ``bool`` of the given shape, each with probability ``density``; the key decides.

    Args:
        shape: of the leaf.
        density: in (0, 1].
        key: names seed, round, client and leaf, so that the mask depends on nothing else.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed)) < density


def _check(name: str, density: float, scale: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"{name}: got density={density}, expected above 0 and at most 1")
    if not 0.0 < scale <= 10.0:
        raise ConfigError(f"{name}: got scale={scale}, expected above 0 and at most 10")


@dataclass(frozen=True)
class Ties(HeldRule):
    """Trim, elect signs, merge what agrees.

    Attributes:
        density: share of entries each client keeps.
        scale: factor on the merged change.
    """

    density: float = 0.2
    scale: float = 1.0

    name: ClassVar[str] = "ties"
    capability: ClassVar[Capability] = Capability(
        summary="largest entries of each change, elected signs, mean of those that agree",
        paper="2306.01708",
        exact=frozenset(),
        exact_note="a sign-elected mean of trimmed changes",
        streaming=False,
        secure_aggregation=False,
        differential_privacy=False,
        codecs_refused=frozenset({"sign"}),
        codecs_note="it picks entries by their size, and one bit has none",
    )

    def __post_init__(self) -> None:
        _check(self.name, self.density, self.scale)

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.require_current(self.name)
        return state

    def _sparse(self, change: Tensor, state: State, update: Update, name: str) -> Tensor:
        return trim(change, self.density)

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        current, updates = state.require_current(self.name), state.in_order()
        weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
        out = dict(current)
        for name in updates[0].leaves:
            base = current[name].double()
            changes = torch.stack(
                [self._sparse(u.leaves[name].double() - base, state, u, name) for u in updates]
            )
            out[name] = (base + self.scale * elect(changes, weights)).to(state.spec.leaves[name].dtype)
        return out


@dataclass(frozen=True)
class DareTies(Ties):
    """Random drop and rescale instead of trimming, then TIES' election.

    Attributes:
        seed: of the masks.
    """

    density: float = 0.5
    seed: int = 0

    name: ClassVar[str] = "dare_ties"
    capability: ClassVar[Capability] = replace(
        Ties.capability,
        summary="random entries of each change, rescaled, elected signs",
        paper="2311.03099",
        exact_note="a sign-elected mean of randomly thinned changes",
        codecs_refused=frozenset(),  # chance picks the entries, not their size
        codecs_note="",
    )

    def _sparse(self, change: Tensor, state: State, update: Update, name: str) -> Tensor:
        kept = dare_mask(change.shape, self.density, f"{self.seed}/{state.round}/{update.client}/{name}")
        return change * kept / self.density


@dataclass(frozen=True)
class Dare(MeanRule):
    """FedAvg of changes of which random entries are dropped and the rest scaled up.

    Attributes:
        density: probability of keeping an entry.
        seed: of the masks.
    """

    density: float = 0.5
    seed: int = 0

    name: ClassVar[str] = "dare"
    capability: ClassVar[Capability] = Capability(
        summary="FedAvg of randomly thinned and rescaled changes",
        paper="2311.03099",
        exact=frozenset(),
        exact_note="FedAvg in expectation",
        secure_aggregation=False,
        differential_privacy=False,
    )

    def __post_init__(self) -> None:
        _check(self.name, self.density, 1.0)

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.require_current(self.name)
        # |theta + (theta_k - theta) / density| <= (1 + 2 / density) max_abs
        wide = replace(spec, max_abs=spec.max_abs * (1.0 + 2.0 / self.density))
        state.sums["mean"] = mean_sum(wide, self.travelling(spec, round))
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        current, total = state.require_current(self.name), state.sums["mean"]
        require_resolution(total.grid, update.weight, update.client)
        total.add(self._thinned(state, update, current, total), update.weight)
        state.count(update)
        return state

    def _thinned(self, state: State, update: Update, current: Leaves, total: FixedSum) -> Leaves:
        out = {}
        for name in total.shapes:
            base = current[name].double()
            kept = dare_mask(base.shape, self.density, f"{self.seed}/{state.round}/{update.client}/{name}")
            out[name] = base + (update.leaves[name].double() - base) * kept / self.density
        return out
