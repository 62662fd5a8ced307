"""LoRA (arXiv 2106.09685), rank-stabilised LoRA (arXiv 2312.03732), and FFA-LoRA with one factor frozen
(arXiv 2403.12313)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from fednano.adapters import philox, sites
from fednano.adapters.fused import LowRank
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register

__all__ = ["FFA", "LoRA", "Scaled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Method):
    """A method with a rank and the factor ``s = alpha / r`` before its change.

    Attributes:
        rank: r.
        alpha: numerator of s; None makes s = 1.
    """

    rank: int = 8
    alpha: float | None = None

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def resized(self, rank: int) -> Method:
        """Another rank, with alpha adjusted so that s stays."""
        alpha = None if self.alpha is None else self.scale * rank
        return dataclasses.replace(self, rank=rank, alpha=alpha)


@register("lora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Scaled):
    """``delta = s B A`` with ``A`` ``(r, d_in)`` and ``B`` ``(d_out, r)``. Parameters: ``r (d_in + d_out)``.

    Linear, bridge and conv2d sites start with a Kaiming-uniform A and B = 0. A convolution applies A as a
    k x k convolution to r channels and B as a 1 x 1 one. An embedding starts with A = 0 and a normal B:
    A's columns are looked up one at a time, so a Kaiming A would be as small as 1/sqrt(vocabulary).

    Attributes:
        rslora: whether s = alpha / sqrt(r) instead of alpha / r (with alpha None: s = 1 either way).
    """

    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor s."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def resized(self, rank: int) -> Method:
        """Another rank, with alpha adjusted so that s stays."""
        if self.alpha is None or not self.rslora:
            return super().resized(rank)
        return dataclasses.replace(self, rank=rank, alpha=self.scale * math.sqrt(rank))

    @property
    def algebra(self) -> Algebra:
        """A product of two trained factors; linear in the shared one if the other is personal."""
        return Algebra.AFFINE if self.personal else Algebra.MULTILINEAR

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """``A`` ``(r, d_in)`` and ``B`` ``(d_out, r)``."""
        a, b = (self.rank, site.d_in), (site.d_out, self.rank)
        if site.kind == "embedding":
            return {"A": Leaf(a), "B": Leaf(b, init=Init("normal"))}
        return {"A": Leaf(a, init=Init("uniform", 1 / math.sqrt(site.d_in))), "B": Leaf(b)}

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B A``."""
        return self.scale * (theta["B"] @ theta["A"])

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B (A x)``."""
        return self.scale * sites.low_rank(site, x, theta["A"], theta["B"])

    def low_rank_form(self, theta: Tensors, basis: Tensors) -> LowRank:
        """A, B and s."""
        return LowRank(theta["A"], theta["B"], self.scale)


@register("ffa")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FFA(Scaled):
    """LoRA with one factor frozen at a seeded value, so that updates average exactly.

    Parameters: ``r d_out`` (``train="B"``) or ``r d_in``.

    Attributes:
        train: which factor is trained, from zero.
    """

    train: Literal["A", "B"] = "B"

    @property
    def algebra(self) -> Algebra:
        """Linear in the one trained factor."""
        return Algebra.AFFINE

    @property
    def basis(self) -> Basis:
        """The frozen factor is drawn from the seed."""
        return Basis.SEED

    def _shape(self, site: Site, name: str) -> tuple[int, int]:
        return (self.rank, site.d_in) if name == "A" else (site.d_out, self.rank)

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """The trained factor, from zero."""
        return {self.train: Leaf(self._shape(site, self.train))}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """The other factor: uniform, of a size that does not depend on the rank."""
        name = "A" if self.train == "B" else "B"
        if name == "B":
            bound = math.sqrt(3 / site.d_out)  # columns of norm 1
        else:
            bound = (
                1.0 if site.kind == "embedding" else 1 / math.sqrt(site.d_in)
            )  # ids look up single columns
        return {name: Leaf(self._shape(site, name), init=Init("uniform", bound), role="frozen")}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Draw the frozen factor rank by rank, so that a smaller rank is the beginning of a larger one."""
        ((name, leaf),) = self.frozen(site).items()
        k = philox.key(seed, site.name, name)
        if name == "A":
            return {"A": philox.uniform(k, leaf.shape, leaf.init.scale)}
        return {"B": philox.uniform(k, leaf.shape[::-1], leaf.init.scale).T.contiguous()}

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B A``."""
        both = {**theta, **basis}
        return self.scale * (both["B"] @ both["A"])

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B (A x)``."""
        both = {**theta, **basis}
        return self.scale * sites.low_rank(site, x, both["A"], both["B"])

    def low_rank_form(self, theta: Tensors, basis: Tensors) -> LowRank:
        """A, B and s."""
        both = {**theta, **basis}
        return LowRank(both["A"], both["B"], self.scale)
