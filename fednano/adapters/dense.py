"""The whole matrix as one trained leaf: full fine-tuning of a site, and the way to gather gradients for other bases."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Leaf, Site, Tensors
from fednano.adapters.registry import register

__all__ = ["Dense"]


@register("dense")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """``delta = D``, from zero. Parameters: ``d_in d_out``. The baseline that every small adapter is measured
    against."""

    @property
    def algebra(self) -> Algebra:
        """The leaf is the change."""
        return Algebra.AFFINE

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """D ``(d_out, d_in)``."""
        return {"D": Leaf((site.d_out, site.d_in))}

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """D."""
        return theta["D"]
