"""SNELLA (arXiv 2510.24037): a sparse change from a mixed kernel of two sets of trained points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fednano.adapters import philox
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError

__all__ = ["SNELLA"]


@register("snella")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SNELLA(Method):
    """``delta = K(In, Out) - K(In_0, Out_0)``. Parameters: ``q (d_in + d_out) + 3``.

    ``w = c sum_h (-1)^h dist(Out_h, In_h)`` over H heads of q / H dimensions, ``w + al softmax(w / ga, over
    outputs) + be``, then ``K = w |w|`` where ``|w|`` is among the largest entries, else 0. The product with ``|w|``
    is in the authors' code. There the change does not start at zero; here the kernel of the seeded start is
    subtracted, so that it does. Averages must be taken in delta space.

    Attributes:
        rank: q, total dimensions of the points; divisible by ``heads``.
        heads: H.
        scale: c.
        sparsity: share of entries that are zero in each kernel.
    """

    rank: int = 8
    heads: int = 2
    scale: float = 0.1
    sparsity: float = 0.7

    def validate(self) -> None:
        """Check the options."""
        if self.heads < 1 or self.rank % self.heads:
            raise ConfigError(
                f"adapter {self.name!r}: got rank={self.rank}, heads={self.heads}; expected rank divisible by heads"
            )
        if not 0 <= self.sparsity < 1:
            raise ConfigError(
                f"adapter {self.name!r}: got sparsity={self.sparsity}; expected 0 <= sparsity < 1"
            )

    @property
    def algebra(self) -> Algebra:
        """None."""
        return Algebra.NONLINEAR

    @property
    def basis(self) -> Basis:
        """The seeded start."""
        return Basis.SEED

    @property
    def resizable(self) -> bool:
        """Never: distances change with every dimension."""
        return False

    def _points(self, site: Site) -> dict[str, tuple[int, int, int]]:
        per_head = self.rank // self.heads
        return {"In": (self.heads, site.d_in, per_head), "Out": (self.heads, site.d_out, per_head)}

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """Points ``In`` ``(H, d_in, q/H)``, ``Out`` ``(H, d_out, q/H)`` and the mixture's ``al``, ``be``, ``ga``,
        each ``(1,)``."""
        points = {name: Leaf(shape, init=Init("computed")) for name, shape in self._points(site).items()}
        return {**points, "al": Leaf((1,)), "be": Leaf((1,)), "ga": Leaf((1,), init=Init("constant"))}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """The points at the start."""
        return {f"{name}0": Leaf(shape, role="frozen") for name, shape in self._points(site).items()}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Draw normal points."""
        return {
            f"{name}0": philox.normal(philox.key(seed, site.name, name), shape)
            for name, shape in self._points(site).items()
        }

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """The seeded points."""
        return basis[f"{name}0"]

    def _kernel(
        self, inside: Tensor, outside: Tensor, mixture: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        w = inside.new_zeros(outside.shape[1], inside.shape[1])
        for head in range(self.heads):
            # The textbook form of cdist: the matrix-product one loses digits and its gradient with them.
            square = (outside[head][:, None, :] - inside[head][None, :, :]).square().sum(-1)
            w = w + (-1) ** head * square.clamp_min(1e-24).sqrt()
        w = self.scale * w
        if mixture is not None:
            al, be, ga = mixture
            w = w + al * torch.softmax(w / ga, dim=0) + be
        size = w.abs()
        zeros = int(self.sparsity * w.numel())
        if not zeros:
            return w * size
        threshold = size.detach().flatten().kthvalue(zeros).values
        return torch.where(size > threshold, w * size, torch.zeros_like(w))

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """The kernel now less the kernel at the start."""
        now = self._kernel(theta["In"], theta["Out"], (theta["al"], theta["be"], theta["ga"]))
        return now - self._kernel(basis["In0"], basis["Out0"], None)
