"""NanoAdapter: the low-rank residual adapter between a connector and the language model (FedNano, arXiv
2506.14824)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from fednano.adapters.fused import LowRank
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Init, Kind, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError, ModelError

__all__ = ["NanoAdapter"]


@register("nano")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NanoAdapter(Method):
    """``y = base(x) + s * act(x A) B``; at a bridge the base is the identity.

    ``A`` ``(d_in, r)`` starts Kaiming-uniform, ``B`` ``(r, d_out)`` at zero: the layer starts as its base.
    Parameters: ``r (d_in + d_out)``. With ``act="gelu"`` the change depends on the input and cannot be
        merged.

    Attributes:
        rank: r.
        act: ``linear``, or ``gelu`` (the exact one, with erf).
        scale: s.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset(("linear", "bridge"))

    rank: int = 8
    act: Literal["linear", "gelu"] = "linear"
    scale: float = 1.0

    def validate(self) -> None:
        """Check the options."""
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ConfigError(
                f"adapter 'nano': got scale={self.scale}; expected a finite number other than 0"
            )

    @property
    def algebra(self) -> Algebra:
        """A product of two trained factors, linear in one if the other is personal; with GELU no algebra while A is
        shared."""
        if "A" in self.personal:
            return Algebra.AFFINE
        if self.act != "linear":
            return Algebra.NONLINEAR
        return Algebra.AFFINE if self.personal else Algebra.MULTILINEAR

    @property
    def mergeable(self) -> bool:
        """Only without the activation."""
        return self.act == "linear"

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """``A`` ``(d_in, r)`` and ``B`` ``(r, d_out)``."""
        return {
            "A": Leaf((site.d_in, self.rank), init=Init("uniform", 1 / math.sqrt(site.d_in))),
            "B": Leaf((self.rank, site.d_out)),
        }

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s (A B)^T``."""
        if self.act != "linear":
            raise ModelError(
                f"adapter 'nano' with act={self.act!r} at site {site.name!r} is not one matrix: it cannot "
                "be merged or exported "
                "as a delta; use act='linear'"
            )
        return self.scale * (theta["A"] @ theta["B"]).T

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s * act(x A) B`` for ``x`` ``(..., d_in)``."""
        z = x @ theta["A"]
        return self.scale * ((F.gelu(z) if self.act == "gelu" else z) @ theta["B"])

    def low_rank_form(self, theta: Tensors, basis: Tensors) -> LowRank:
        """``A^T``, ``B^T``, s and the activation."""
        return LowRank(theta["A"].T, theta["B"].T, self.scale, self.act)
