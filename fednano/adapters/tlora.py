"""TLoRA (arXiv 2501.08727): transform the input by a tensor-ring matrix, and add a tensor-ring residual."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Basis, Init, Kind, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError, ModelError

__all__ = ["TLoRA", "factorise", "penalty"]


def factorise(n: int, parts: int) -> tuple[int, ...]:
    """Split n into ``parts`` factors of similar size, largest first: prime factors go to the smallest product so
    far."""
    primes, rest, p = [], n, 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p = p + 1 if p * p <= rest else max(rest, 2)
    products = [1] * parts
    for prime in reversed(primes):
        products[products.index(min(products))] *= prime
    return tuple(sorted(products, reverse=True))


@register("tlora")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TLoRA(Method):
    """``y = W (T x) + D x``, so ``delta = W (T - I) + D``. Parameters: ``sum_d I_d^2 R^2 + sum_d (I_d + J_d) r^2``
    for d_in = prod I_d, d_out = prod J_d.

    ``T[i1..iD, j1..jD] = tr(T1[i1, j1] ... TD[iD, jD])`` with cores ``(I_d, I_d, R, R)`` that start as ``I / R`` in
    every ring position, which makes T the identity (to the last bit if R is a power of two). D is a tensor ring
    with a core ``(n, r, r)`` per factor of d_out and d_in; the first starts at zero. The bias is added once: the
    base layer sees ``T x``.

    Attributes:
        rank: r, ring rank of the residual.
        transform_rank: R, ring rank of the transform.
        factors: D, how many factors each width is split into.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset(("linear", "conv2d", "bridge"))

    rank: int = 2
    transform_rank: int = 2
    factors: int = 3

    def validate(self) -> None:
        """Check the options."""
        if self.transform_rank < 1 or self.factors < 1:
            raise ConfigError(
                f"adapter {self.name!r}: got transform_rank={self.transform_rank}, factors={self.factors}; "
                "expected >= 1"
            )

    @property
    def algebra(self) -> Algebra:
        """Products of cores."""
        return Algebra.MULTILINEAR

    def _ring(self, site: Site) -> tuple[int, ...]:
        return factorise(site.d_out, self.factors) + factorise(site.d_in, self.factors)

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """Cores ``T0..`` of the transform and ``D0..`` of the residual."""
        r, big = self.rank, self.transform_rank
        leaves = {
            f"T{d}": Leaf((n, n, big, big), init=Init("computed"))
            for d, n in enumerate(factorise(site.d_in, self.factors))
        }
        for d, n in enumerate(self._ring(site)):
            leaves[f"D{d}"] = Leaf((n, r, r), init=Init("normal", 1 / math.sqrt(r)) if d else Init())
        return leaves

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``I / R`` at every ring position."""
        n = factorise(site.d_in, self.factors)[int(name[1:])]
        big = self.transform_rank
        return torch.eye(n)[:, :, None, None].expand(n, n, big, big) / big

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Nothing is frozen, but the change is relative to a weight.

        Raises:
            ModelError: there is none.
        """
        if weight is None and site.kind != "bridge":
            raise ModelError(
                f"adapter {self.name!r} at {site.kind} site {site.name!r} needs a base weight, and there is none; "
                "give base= or "
                "weight=, or use 'lora'"
            )
        return {}

    @property
    def basis(self) -> Basis:
        """None."""
        return Basis.NONE

    def transform(self, site: Site, theta: Tensors) -> Tensor:
        """T ``(d_in, d_in)``."""
        if self.factors == 1:
            return torch.einsum("abxx->ab", theta["T0"])
        whole = theta["T0"]
        for d in range(1, self.factors - 1):
            whole = torch.einsum("abxy,cdyz->acbdxz", whole, theta[f"T{d}"])
            whole = whole.flatten(0, 1).flatten(1, 2)
        # The last product closes the ring: the (d_in, d_in, R, R) tensor is never formed.
        return torch.einsum("abxy,cdyx->acbd", whole, theta[f"T{self.factors - 1}"]).reshape(
            site.d_in, site.d_in
        )

    def residual(self, site: Site, theta: Tensors) -> Tensor:
        """D ``(d_out, d_in)``."""
        first, second = theta["D0"], theta[f"D{self.factors}"]
        for d in range(1, self.factors):
            first = torch.einsum("axy,byz->abxz", first, theta[f"D{d}"]).flatten(0, 1)
            second = torch.einsum("axy,byz->abxz", second, theta[f"D{self.factors + d}"]).flatten(0, 1)
        return torch.einsum("axy,byx->ab", first, second)

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``W (T - I) + D``; at a bridge W is the identity."""
        t = self.transform(site, theta)
        moved = t - torch.eye(site.d_in, dtype=t.dtype, device=t.device)
        if weight is not None:
            moved = weight.to(t.dtype) @ moved
        return moved + self.residual(site, theta)

    def forward(
        self,
        site: Site,
        x: Tensor,
        base: Callable[[Tensor], Tensor] | None,
        theta: Tensors,
        basis: Tensors,
        *,
        weight: Tensor | None,
        training: bool,
    ) -> Tensor:
        """``base(T x) + D x`` at linear and bridge sites: one product with W instead of two."""
        if base is None or site.kind == "conv2d" or self.dropout:
            return Method.forward(self, site, x, base, theta, basis, weight=weight, training=training)
        inside = x.to(theta["T0"].dtype)
        out = base(F.linear(inside, self.transform(site, theta)).to(x.dtype))
        return out + F.linear(inside, self.residual(site, theta)).to(out.dtype)

    def quiet(self, fresh: Tensors, theta: Tensors, basis: Tensors) -> None:
        """Keep old and new ring positions apart, so that the trace over the old ones stays; the first core closes
        the new ones."""
        for name, value in fresh.items():
            if name[0] == "D":
                old = theta[name].shape[-1]
                value[:, :old, old:] = 0
                value[:, old:, :old] = 0


def penalty(adapter: TLoRA, theta: Tensors) -> Tensor:
    """The paper's regulariser: squared distance of the transform's cores from their identity start."""
    big = adapter.transform_rank
    total = theta["T0"].new_zeros(())
    for d in range(adapter.factors):
        core = theta[f"T{d}"]
        identity = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)[:, :, None, None] / big
        total = total + (core - identity).square().sum()
    return total
