"""Streaming rules for clients of different rank that average slices of the factors: HetLoRA and nested ranks.

Both are means in factor space, so they are approximations for products; what they buy is streaming (sums only)
at any mix of ranks. Rank j of a client is rank j of the server: clients must start from slices of the same
global factors.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.fixedpoint import FixedSum
from fednano.aggregation.lowrank import inner, pad_rank
from fednano.aggregation.mean import MeanRule, require_resolution
from fednano.aggregation.products import products_only
from fednano.aggregation.rule import Capability, State, rescaled
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Update
from fednano.errors import ConfigError

__all__ = ["HetLoRA", "NestedRanks"]


class _Slices(MeanRule):
    """Zero-padded factors are summed per site; ``_factor`` says with what weight."""

    def _factor(self, site: str, spec: Spec, update: Update) -> float:
        return update.weight

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`."""
        products_only(spec, self.name)
        state = super().init(spec, current=current, memory=memory, round=round)
        inside = set(spec.rank_axes())
        grid = state.sums["mean"].grid
        shapes = {n: leaf.shape for n, leaf in spec.leaves.items()}
        state.sums = {"mean": FixedSum(grid, {n: s for n, s in shapes.items() if n not in inside})}
        for site, product in spec.products.items():
            state.sums[site] = FixedSum(grid, {n: shapes[n] for n in (product.left, product.right)})
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        spec, grid = state.spec, state.sums["mean"].grid
        require_resolution(grid, update.weight, update.client)
        factors = {site: self._factor(site, spec, update) for site in spec.products}
        done: list[tuple[FixedSum, Leaves, float]] = []
        try:
            for site, product in spec.products.items():
                factor = factors[site]
                require_resolution(grid, factor, update.client)
                ratio = update.scale(site, product) / product.scale
                left, right = pad_rank(
                    update.leaves[product.left], update.leaves[product.right], spec.rank(site)
                )
                # The scale goes to the factor that starts at zero, as in `for_client`.
                pair = (left, right * ratio) if product.down == "left" else (left * ratio, right)
                padded = {product.left: pair[0], product.right: pair[1]}
                state.sums[site].add(padded, factor)
                done.append((state.sums[site], padded, factor))
            state.sums["mean"].add(update.leaves, update.weight)
        except Exception:
            for total, padded, factor in done:
                total.remove(padded, factor)
            raise
        for site, product in spec.products.items():
            rank, exact = update.leaves[product.left].shape[1], Fraction(factors[site])
            for j in range(min(rank, spec.rank(site))):
                state.numbers[f"{site}#{j}"] = state.numbers.get(f"{site}#{j}", Fraction(0)) + exact
            state.numbers[site] = state.numbers.get(site, Fraction(0)) + exact
        state.count(update)
        return state

    def _divisors(self, state: State, site: str, rank: int) -> Tensor:
        """What each rank's sum is divided by, ``(rank,)`` float64; zero where nobody sent that rank."""
        raise NotImplementedError

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`. A rank that no client sent keeps its current value (zero without ``current``)."""
        state.require_updates()
        spec, mean = state.spec, state.sums["mean"]
        out = {n: mean.write(n, float(state.weight), spec.leaves[n].dtype) for n in mean.shapes}
        for site, product in spec.products.items():
            divisors = self._divisors(state, site, spec.rank(site))
            for name, axis in ((product.left, 1), (product.right, 0)):
                total = state.sums[site].value(name)
                by = divisors[None, :] if axis == 1 else divisors[:, None]
                old = torch.zeros_like(total) if state.current is None else state.current[name].double()
                out[name] = torch.where(by > 0.0, total / by.clamp_min(1e-300), old).to(
                    spec.leaves[name].dtype
                )
        return out

    def for_client(
        self,
        leaves: Leaves,
        spec: Spec,
        *,
        ranks: Mapping[str, int] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Leaves:
        """The first ranks of each factor, in the client's scale. See `Rule.for_client`."""
        out = dict(leaves)
        for site, rank in (ranks or {}).items():
            if not 1 <= rank <= spec.rank(site):
                raise ConfigError(
                    f"rule {self.name!r}: client rank {rank} at site {site}, "
                    f"expected 1 to the global rank {spec.rank(site)}"
                )
            product = spec.products[site]
            out[product.left], out[product.right] = pad_rank(
                leaves[product.left], leaves[product.right], rank
            )
        return rescaled(out, spec, {k: spec.products[k].scale / v for k, v in (scales or {}).items()})


def _sliced(summary: str, paper: str, note: str, secure: bool) -> Capability:
    return Capability(
        summary=summary,
        paper=paper,
        exact=frozenset(),
        exact_note=note,
        bytes_up="r_k / r",
        bytes_down="r_k / r",
        secure_aggregation=secure,
        differential_privacy=secure,
        ranks=True,
        needs=frozenset({"products"}),
    )


@dataclass(frozen=True)
class HetLoRA(_Slices):
    """Zero-padded factors, weighted by the norm of each client's delta (arXiv 2401.06432).

    A site's weight is ``max(|s_k L_k R_k|_F, floor)``, so that a first round of zero deltas is a plain mean.

    Attributes:
        floor: smallest weight of a client at a site.
        by_samples: multiply by the update's weight as well.
    """

    floor: float = 1e-3
    by_samples: bool = False

    name: ClassVar[str] = "hetlora"
    capability: ClassVar[Capability] = _sliced(
        "zero-padded factors weighted by the norm of each client's delta",
        "2401.06432",
        "a norm-weighted mean of zero-padded factors; approximate for products",
        False,
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.floor < math.inf:
            raise ConfigError(f"hetlora: got floor={self.floor}, expected a positive number")

    def _factor(self, site: str, spec: Spec, update: Update) -> float:
        product = spec.products[site]
        pair = (update.leaves[product.left].double(), update.leaves[product.right].double())
        norm = abs(update.scale(site, product)) * math.sqrt(max(inner(pair, pair), 0.0))
        return max(norm, self.floor) * (update.weight if self.by_samples else 1.0)

    def _divisors(self, state: State, site: str, rank: int) -> Tensor:
        return torch.full((rank,), float(state.numbers[site]), dtype=torch.float64)


@dataclass(frozen=True)
class NestedRanks(_Slices):
    """Each rank is the mean over the clients that have it: small clients do not shrink the high ranks."""

    name: ClassVar[str] = "nested"
    capability: ClassVar[Capability] = _sliced(
        "each rank averaged over the clients that have it",
        "",
        "slice-wise means of the factors with counts; approximate for products",
        True,
    )

    def _divisors(self, state: State, site: str, rank: int) -> Tensor:
        counts = [float(state.numbers.get(f"{site}#{j}", Fraction(0))) for j in range(rank)]
        return torch.tensor(counts, dtype=torch.float64)
