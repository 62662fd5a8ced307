"""DSCLoRA's ConvLoRA (arXiv 2504.11271): a low-rank change of a convolution that merges at no cost."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from torch import Tensor

from fednano.adapters.lora import Scaled
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Init, Kind, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ModelError

__all__ = ["ConvLoRA"]


@register("convlora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvLoRA(Scaled):
    """``delta = s (B A)`` read as ``(out, in, k, k)``, with ``A`` ``(r k, in k)`` and ``B`` ``(out k, r k)``.
    Parameters: ``r k^2 (in + out)``.

    The product is reinterpreted in memory order, as in loralib: not the k x k convolution followed by a 1 x 1 one
        that LoRA uses at the same
    site, and of a rank up to r k. Square kernels and one group only. At a linear site k = 1, which is LoRA.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset(("linear", "conv2d", "bridge"))

    @property
    def algebra(self) -> Algebra:
        """A product of two trained factors."""
        return Algebra.AFFINE if self.personal else Algebra.MULTILINEAR

    def check(self, site: Site) -> None:
        """Square kernels, one group."""
        Method.check(self, site)
        if site.kernel[0] != site.kernel[1] or site.groups != 1:
            raise ModelError(
                f"adapter {self.name!r} cannot sit on conv2d site {site.name!r}: got kernel {site.kernel}, groups "
                f"{site.groups}; it "
                "needs a square kernel and one group. Use 'lora' there"
            )

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """``A`` ``(r k, in k)`` and ``B`` ``(out k, r k)``."""
        k = site.kernel[0]
        width = site.d_in // k  # in * k
        return {
            "A": Leaf((self.rank * k, width), init=Init("uniform", 1 / math.sqrt(width))),
            "B": Leaf((site.d_out * k, self.rank * k)),
        }

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B A`` in memory order."""
        return self.scale * (theta["B"] @ theta["A"]).reshape(site.d_out, site.d_in)
