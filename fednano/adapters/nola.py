"""NOLA (arXiv 2310.02556): factors that are combinations of random matrices, so that only the coefficients are
trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fednano.adapters import philox, sites
from fednano.adapters.lora import Scaled
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError

__all__ = ["NOLA", "combine"]

_ELEMENTS = 1 << 22  # random numbers held at once while combining
_STORED = 1 << 23  # with store="auto", random numbers that a site may keep: 32 MiB


def _planes(coefficients: Tensor, key: Tensor, n: int, start: int, stop: int) -> Tensor:
    """Random matrices ``start..stop`` as rows ``(stop - start, n)``, uniform in +-1/sqrt(k)."""
    bound = 1 / math.sqrt(coefficients.shape[-1])
    drawn = philox.uniform(
        key, (stop - start, n), bound, planes=True, first=start, device=coefficients.device
    )
    return drawn.to(coefficients.dtype)


class _Combine(torch.autograd.Function):
    """``sum_k c_k P_k`` with P_k drawn anew in forward and in backward: nothing of their size is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(coefficients: Tensor, key: Tensor, n: int) -> Tensor:
        """``(k,)`` to ``(n,)``."""
        total = coefficients.new_zeros(n)
        for start, stop in _chunks(coefficients.shape[0], n):
            total = total + coefficients[start:stop] @ _planes(coefficients, key, n, start, stop)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        """Keep the key, not the matrices."""
        coefficients, key, n = inputs
        ctx.save_for_backward(coefficients, key)
        ctx.n = n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """``dc_k = <P_k, gradient>``."""
        coefficients, key = ctx.saved_tensors
        parts = [
            _planes(coefficients, key, ctx.n, start, stop) @ gradient
            for start, stop in _chunks(coefficients.shape[0], ctx.n)
        ]
        return torch.cat(parts), None, None


def _chunks(count: int, n: int) -> list[tuple[int, int]]:
    size = max(4, _ELEMENTS // n // 4 * 4)  # whole Philox blocks of four planes
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def combine(coefficients: Tensor, key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``sum_k c_k P_k`` with seeded ``P_k ~ U(-1, 1) / sqrt(k)``, regenerated in the backward pass.

    Args:
        coefficients: ``(k,)``.
        key: 0-d int64, the Philox key; ``P_k`` is plane k of `philox.uniform`.
        shape: shape of the result.
    """
    out: Tensor = _Combine.apply(coefficients, key, math.prod(shape))  # type: ignore[no-untyped-call]
    return out.view(shape)


@register("nola")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NOLA(Scaled):
    """``delta = s B A`` with ``A = A_0 + sum_k a_k A_k`` and ``B = sum_k b_k B_k``, a = b = 0 at first. Parameters:
    ``coefficients_a + coefficients_b``, whatever the shape and the rank.

    ``A_0`` is Kaiming-uniform and frozen; the ``A_k``, ``B_k`` follow from the seed and need not be stored. The
    random matrices of B are numbered rank by rank, so ranks that stay keep their function when the rank changes;
    new ranks use the same coefficients and therefore add something at once.

    Attributes:
        coefficients_a: number of random matrices in A.
        coefficients_b: number of random matrices in B.
        frozen_a: keep ``A = A_0`` and train b only: updates then average exactly.
        store: ``never`` draws the random matrices anew in every forward and backward pass; ``always`` keeps them in
            memory (they are never shipped); ``auto`` keeps them at sites where they are small.
    """

    grows_silently = False

    coefficients_a: int = 1024
    coefficients_b: int = 1024
    frozen_a: bool = False
    store: Literal["auto", "always", "never"] = "auto"

    def validate(self) -> None:
        """Check the options."""
        for option in ("coefficients_a", "coefficients_b"):
            if getattr(self, option) < 1:
                raise ConfigError(
                    f"adapter {self.name!r}: got {option}={getattr(self, option)}; expected >= 1"
                )

    @property
    def algebra(self) -> Algebra:
        """A product of two combinations, unless A is frozen."""
        return Algebra.AFFINE if self.frozen_a or self.personal else Algebra.MULTILINEAR

    @property
    def basis(self) -> Basis:
        """Seeded."""
        return Basis.SEED

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """a and b."""
        leaves = {"b": Leaf((self.coefficients_b,))}
        return leaves if self.frozen_a else {"a": Leaf((self.coefficients_a,)), **leaves}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """``A0`` ``(r, d_in)`` and the two Philox keys of the random matrices."""
        bound = 1.0 if site.kind == "embedding" else 1 / math.sqrt(site.d_in)
        return {
            "A0": Leaf((self.rank, site.d_in), init=Init("uniform", bound), role="frozen"),
            "keys": Leaf((2,), torch.int64, role="index"),
        }

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Draw ``A0`` and derive the keys."""
        keys = [philox.signed(philox.key(seed, site.name, name)) for name in ("a", "b")]
        return {**super().freeze(site, weight, seed, stats), "keys": torch.tensor(keys)}

    def derive(self, site: Site, basis: Tensors) -> Tensors:
        """The random matrices ``(k, r d)``, where they are stored."""
        sizes = {"b": (self.coefficients_b, self.rank * site.d_out)}
        if not self.frozen_a:
            sizes["a"] = (self.coefficients_a, self.rank * site.d_in)
        total = sum(k * n for k, n in sizes.values())
        if self.store == "never" or (self.store == "auto" and total > _STORED):
            return {}
        return {
            f"planes_{name}": philox.uniform(
                basis["keys"]["ab".index(name)], (k, n), 1 / math.sqrt(k), planes=True
            )
            for name, (k, n) in sizes.items()
        }

    def _combined(self, name: str, theta: Tensors, basis: Tensors, width: int) -> Tensor:
        if f"planes_{name}" in basis:
            return (theta[name] @ basis[f"planes_{name}"]).view(self.rank, width)
        return combine(theta[name], basis["keys"]["ab".index(name)], (self.rank, width))

    def _factors(self, site: Site, theta: Tensors, basis: Tensors) -> tuple[Tensor, Tensor]:
        a = basis["A0"] if self.frozen_a else basis["A0"] + self._combined("a", theta, basis, site.d_in)
        return a, self._combined("b", theta, basis, site.d_out).T

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B A``."""
        a, b = self._factors(site, theta, basis)
        return self.scale * (b @ a)

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B (A x)``."""
        a, b = self._factors(site, theta, basis)
        return self.scale * sites.low_rank(site, x, a, b)
