"""WaRA (arXiv 2506.24092): a low-rank change between Haar sub-bands of the features."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fednano.adapters.lora import Scaled
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ModelError

__all__ = ["WaRA"]


@register("wara")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WaRA(Scaled):
    """``delta = s H_o^T blockdiag(B_lo A_lo, B_hi A_hi) H_i`` with one-level Haar transforms H of neighbouring
    features.

    Parameters: ``r (d_in + d_out) / 2`` with shared bands (the paper's count), twice that with their own. The
        authors' code is not
    public. One linear adapter shared by all bands commutes with the transform: the change is then ``B A`` on even
    and on odd features separately, rank 2 r; and a transform along tokens would cancel altogether. ``bands="own"``
    lets the bands differ.

    Attributes:
        bands: ``shared`` or ``own``.
    """

    bands: Literal["shared", "own"] = "shared"

    @property
    def algebra(self) -> Algebra:
        """Products of trained factors."""
        return Algebra.AFFINE if self.bands == "shared" and self.personal else Algebra.MULTILINEAR

    def largest_rank(self, site: Site) -> int:
        """Half: two bands of rank r each."""
        return site.full_rank // 2

    def check(self, site: Site) -> None:
        """Features must pair up."""
        Method.check(self, site)
        if site.d_in % 2 or site.d_out % 2:
            raise ModelError(
                f"adapter {self.name!r} cannot sit on {site.kind} site {site.name!r}: d_in={site.d_in} and "
                f"d_out={site.d_out} "
                "must be even for a Haar transform; use 'lora' there"
            )

    def _names(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return (("A", "B"), ("A", "B")) if self.bands == "shared" else (("A", "B"), ("A_hi", "B_hi"))

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """For each band's adapter A ``(r, d_in / 2)`` and B ``(d_out / 2, r)``."""
        half = site.d_in // 2
        leaves: dict[str, Leaf] = {}
        for a, b in self._names():
            leaves[a] = Leaf((self.rank, half), init=Init("uniform", 1 / math.sqrt(half)))
            leaves[b] = Leaf((site.d_out // 2, self.rank))
        return leaves

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """Entry ``(2 a + p, 2 b + q)`` is ``s/2 (M_lo + (-1)^(p+q) M_hi)[a, b]`` with ``M = B A`` of each band."""
        low, high = (theta[b] @ theta[a] for a, b in self._names())
        plus, minus = (low + high) / 2, (low - high) / 2
        cells = torch.stack(
            [torch.stack([plus, minus], -1), torch.stack([minus, plus], -1)], 1
        )  # (a, p, b, q)
        return self.scale * cells.reshape(site.d_out, site.d_in)

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """Transform, two small adapters, transform back; conv2d and embedding sites go through the delta."""
        if site.kind not in ("linear", "bridge"):
            return Method.path(self, site, x, theta, basis, weight)
        even, odd = x[..., 0::2], x[..., 1::2]
        bands = zip(self._names(), (even + odd, even - odd), strict=True)
        low, high = (F.linear(F.linear(band, theta[a]), theta[b]) for (a, b), band in bands)
        return self.scale / 2 * torch.stack([low + high, low - high], dim=-1).flatten(-2)
