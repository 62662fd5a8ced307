"""SHiRA (arXiv 2406.13175): train a few entries of the weight at fixed positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fednano.adapters import bases, philox
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Basis, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError, ModelError

__all__ = ["SHiRA", "scatter", "switch"]


def scatter(site: Site, values: Tensor, positions: Tensor) -> Tensor:
    """Return the dense ``(d_out, d_in)`` matrix with ``values`` ``(n,)`` at flat ``positions`` ``(n,)``."""
    flat = values.new_zeros(site.d_out * site.d_in)
    return flat.scatter(0, positions, values).view(site.d_out, site.d_in)


@register("shira")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """``delta = s scatter(v)`` with fixed positions and v from zero. Parameters: ``r (d_in + d_out)``, as
    LoRA's, or a share of the weight.

    Positions are kept in order of importance, so a smaller rank is the beginning of a larger one.

    Attributes:
        rank: r; capped so that no more than all entries are trained.
        density: share of the entries instead; None uses ``rank``.
        support: which entries: ``random``; ``magnitude`` (largest ``|W|``); ``gradient`` (largest
            ``|G|``); ``snip`` (largest ``|W G|``, the connection sensitivity of arXiv 1810.02340).
        scale: s; adjustable after training.
    """

    size_option: ClassVar[str] = "rank"

    rank: int = 8
    density: float | None = None
    support: Literal["random", "magnitude", "gradient", "snip"] = "random"
    scale: float = 1.0

    def validate(self) -> None:
        """Check the options."""
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"adapter {self.name!r}: got density={self.density}; expected 0 < density <= 1")

    @property
    def algebra(self) -> Algebra:
        """Linear in v."""
        return Algebra.AFFINE

    @property
    def basis(self) -> Basis:
        """Where the positions come from."""
        return {"random": Basis.SEED, "magnitude": Basis.WEIGHT}.get(self.support, Basis.STATS)

    @property
    def resizable(self) -> bool:
        """By rank; a density stays."""
        return self.density is None

    def largest_rank(self, site: Site) -> int:
        """Any where a density is given instead."""
        return site.full_rank if self.density is None else self.rank

    def check(self, site: Site) -> None:
        """Refuse a weight-derived support where no weight can be."""
        super().check(site)
        if site.kind == "bridge" and self.support in ("magnitude", "snip"):
            raise ModelError(self._needs_weight(site))

    def _needs_weight(self, site: Site) -> str:
        return (
            f"adapter {self.name!r} with support={self.support!r} at {site.kind} site {site.name!r} needs a base "
            "weight, and "
            "there is none; use support='random' or support='gradient'"
        )

    def count(self, site: Site) -> int:
        """Number of trained entries."""
        entries = site.d_in * site.d_out
        if self.density is not None:
            return max(1, math.floor(self.density * entries))
        return min(self.rank * (site.d_in + site.d_out), entries)

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """v ``(n,)``."""
        return {"v": Leaf((self.count(site),))}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """Positions ``(n,)`` in the row-major ``(d_out, d_in)`` matrix."""
        return {"positions": Leaf((self.count(site),), torch.int64, role="index")}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Choose the positions, most important first; equal scores in row-major order.

        Raises:
            ModelError: the support needs a weight, and there is none.
            ConfigError: the support needs a gradient, and there is none.
        """
        n = self.count(site)
        if self.support == "random":
            k = philox.key(seed, site.name, "positions")
            return {"positions": philox.sample(k, site.d_in * site.d_out, n)}
        if weight is None and self.support != "gradient":
            raise ModelError(self._needs_weight(site))
        score = torch.ones((), dtype=torch.float64)
        if self.support != "gradient" and weight is not None:
            score = score * weight.double().abs()
        if self.support != "magnitude":
            score = score * bases.require_stat(self.name, site, stats, "gradient").abs()
        return {"positions": torch.sort(score.flatten(), descending=True, stable=True).indices[:n].clone()}

    def extend(self, site: Site, basis: Tensors, weight: Tensor | None, seed: int) -> Tensors:
        """Old positions first; then the next ones of the same order, or random ones where the gradients are gone."""
        old, n, entries = basis["positions"], self.count(site), site.d_in * site.d_out
        if self.support in ("random", "magnitude"):
            more = self.freeze(site, weight, seed, None)["positions"]
        else:
            more = philox.sample(philox.key(seed, site.name, "more"), entries, min(entries, n + len(old)))
        return {"positions": torch.cat([old, more[~torch.isin(more, old)]])[:n]}

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s scatter(v)``."""
        return self.scale * scatter(site, theta["v"], basis["positions"])


def switch(weight: Tensor, values: Tensor, positions: Tensor, saved: Tensor | None = None) -> Tensor:
    """Write sparse changes into a weight in place, or take them out again, touching only their entries.

    This is how a server swaps SHiRA adapters: n writes instead of a rank-r product over the whole matrix.

    Args:
        weight: ``(d_out, d_in)``, contiguous; written.
        values: ``(n,)`` to add at ``positions``; ignored when ``saved`` is given.
        positions: ``(n,)`` int64, different from each other; fastest in ascending order.
        saved: what an earlier call returned; these numbers are put back, bit for bit.

    Returns:
        The ``(n,)`` numbers that were there before.
    """
    flat = weight.view(-1)
    before = flat.take(positions)
    flat.put_(positions, before + values.to(weight.dtype) if saved is None else saved)
    return before
