"""SALT (arXiv 2503.16055): scale and shift the top singular values, a low-rank change for the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fednano.adapters import bases, sites
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError

__all__ = ["SALT", "penalty"]


@register("salt")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SALT(Method):
    """``W' = U S' V^T``: ``a s + b`` for the top k singular values, ``diag(s) + X Y`` for the others. Parameters:
    ``2 k + 2 r (min - k)``.

    The authors' code starts X and Y both at random and passes S' through a ReLU, so that the layer does not start
    as its base and half of X Y is cut away; ``official=True`` does that. The default follows the paper's formula: Y
    = 0, no ReLU, the layer starts as its base. Frozen storage is the full SVD.

    Attributes:
        rank: r.
        top: k.
        official: see above.
    """

    rank: int = 4
    top: int = 8
    official: bool = False

    def validate(self) -> None:
        """Check the options."""
        if self.top < 1:
            raise ConfigError(f"adapter {self.name!r}: got top={self.top}; expected >= 1")

    @property
    def algebra(self) -> Algebra:
        """Scale and shift are affine, X Y is a product; with the ReLU nothing holds."""
        return Algebra.NONLINEAR if self.official else Algebra.MULTILINEAR

    @property
    def basis(self) -> Basis:
        """The weight's SVD."""
        return Basis.WEIGHT

    @property
    def starts_off_zero(self) -> bool:
        """With random X and Y."""
        return self.official

    def largest_rank(self, site: Site) -> int:
        """What the top singular values leave."""
        return site.full_rank - self.top

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """``a`` and ``b`` ``(k,)``, ``X`` ``(min - k, r)``, ``Y`` ``(r, min - k)``."""
        rest = site.full_rank - self.top
        return {
            "a": Leaf((self.top,), init=Init("constant")),
            "b": Leaf((self.top,)),
            "X": Leaf((rest, self.rank), init=Init("normal", 0.01)),
            "Y": Leaf((self.rank, rest), init=Init("normal", 0.01) if self.official else Init()),
        }

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """``U`` ``(d_out, min)``, ``S`` ``(min,)``, ``A = V^T`` ``(min, d_in)``."""
        m = site.full_rank
        return {
            "U": Leaf((site.d_out, m), role="frozen"),
            "S": Leaf((m,), role="frozen"),
            "A": Leaf((m, site.d_in), role="frozen"),
        }

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Full SVD of the weight; without one, of the identity."""
        u, s, v = bases.singular(site, weight, seed, site.full_rank)
        return {"U": u.float(), "S": s.float(), "A": v.T.float().contiguous()}

    def _top(self, theta: Tensors, basis: Tensors) -> Tensor:
        """What is added to the top singular values, ``(k,)``."""
        s = basis["S"][: self.top]
        moved = theta["a"] * s + theta["b"]
        return (torch.relu(moved) if self.official else moved) - s

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``U (S' - S) V^T``."""
        k, s = self.top, basis["S"][self.top :]
        middle = theta["X"] @ theta["Y"]
        if self.official:
            middle = torch.relu(torch.diag(s) + middle) - torch.diag(s)
        head = (basis["U"][:, :k] * self._top(theta, basis)) @ basis["A"][:k]
        return head + basis["U"][:, k:] @ middle @ basis["A"][k:]

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """Two thin products; with the ReLU the dense change."""
        if self.official:
            return Method.path(self, site, x, theta, basis, weight)
        k = self.top
        first = torch.cat([basis["A"][:k], theta["Y"] @ basis["A"][k:]])
        second = torch.cat(
            [basis["U"][:, :k] * self._top(theta, basis), basis["U"][:, k:] @ theta["X"]], dim=1
        )
        return sites.low_rank(site, x, first, second)

    def quiet(self, fresh: Tensors, theta: Tensors, basis: Tensors) -> None:
        """New rows of Y start at zero."""
        fresh["Y"].zero_()


def penalty(theta: Tensors) -> Tensor:
    """The authors' regulariser ``|a - b| + |X Y|_F``."""
    ends, rest = theta["a"] - theta["b"], theta["X"] @ theta["Y"]
    return ends.square().sum().sqrt() + rest.square().sum().sqrt()
