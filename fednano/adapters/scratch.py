"""Layers for parts that are trained from scratch, such as a connector: SLTrain and LOST."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fednano.adapters import bases, philox, sites
from fednano.adapters.lora import Scaled
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.adapters.sparse import scatter
from fednano.errors import ConfigError, ModelError

__all__ = ["LOST", "SLTrain"]


def _check_bridge(name: str, site: Site, replaces_base: bool) -> None:
    """A bridge has nothing to replace."""
    if site.kind == "bridge" and replaces_base:
        raise ModelError(
            f"adapter {name!r} cannot sit on bridge site {site.name!r} with start_from='scratch', which replaces a "
            "layer; use start_from='zero', or a linear site"
        )


@register("sltrain")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SLTrain(Scaled):
    """SLTrain (arXiv 2406.02214): ``W = s B A + scatter(v)``. Parameters: ``r (d_in + d_out) + density d_in d_out``.

    The positions of v are seeded. From scratch this is the whole layer: A Kaiming-uniform, B = 0, v uniform in
    ``+-1/sqrt(d_in)``, and a base layer gives no more than its bias. With ``start_from="zero"`` v starts at zero
    and the sum is added to the base.

    Attributes:
        density: share of the entries that v holds.
        start_from: ``scratch`` or ``zero``.
    """

    density: float = 0.03
    start_from: Literal["scratch", "zero"] = "scratch"

    def validate(self) -> None:
        """Check the options."""
        if not 0 < self.density <= 1:
            raise ConfigError(f"adapter {self.name!r}: got density={self.density}; expected 0 < density <= 1")

    @property
    def algebra(self) -> Algebra:
        """v is affine, B A a product."""
        return Algebra.AFFINE if {"A", "B"} & set(self.personal) else Algebra.MULTILINEAR

    @property
    def basis(self) -> Basis:
        """Seeded positions."""
        return Basis.SEED

    @property
    def starts_off_zero(self) -> bool:
        """From scratch."""
        return self.start_from == "scratch"

    @property
    def replaces_base(self) -> bool:
        """From scratch."""
        return self.start_from == "scratch"

    def check(self, site: Site) -> None:
        """A bridge has nothing to replace."""
        Method.check(self, site)
        _check_bridge(self.name, site, self.replaces_base)

    def _count(self, site: Site) -> int:
        return max(1, math.floor(self.density * site.d_in * site.d_out))

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """``A`` ``(r, d_in)``, ``B`` ``(d_out, r)`` and ``v`` ``(n,)``."""
        bound = 1 / math.sqrt(site.d_in)
        return {
            "A": Leaf((self.rank, site.d_in), init=Init("uniform", bound)),
            "B": Leaf((site.d_out, self.rank)),
            "v": Leaf((self._count(site),), init=Init("uniform", bound) if self.replaces_base else Init()),
        }

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """Positions of v ``(n,)``."""
        return {"positions": Leaf((self._count(site),), torch.int64, role="index")}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Choose the positions."""
        k = philox.key(seed, site.name, "positions")
        return {"positions": philox.sample(k, site.d_in * site.d_out, self._count(site))}

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B A + scatter(v)``."""
        return self.scale * (theta["B"] @ theta["A"]) + scatter(site, theta["v"], basis["positions"])


@register("lost")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LOST(Method):
    """LOST (arXiv 2508.02668): ``y = g B act(A x) + (1 - g) W_s x_I``, from scratch. Parameters: ``r (d_in + d_out)
    + |I| d_out``.

    Starts from the SVD of an initial weight (the base's, or a seeded Kaiming-uniform one): A and B from its top r
    triplets, the channels I are the columns of the residual with the largest norms, ``W_s`` their values. The first
    term is divided by g and the second by 1 - g at the start, so that without the activation the layer starts as
    its initial weight, cut to what it can hold. The authors' code is not public. With ``start_from="zero"`` B and W_s
    start at zero and the sum is added to the base, or behind a bridge; A and I come from the initial weight as ever.

    Attributes:
        rank: r.
        gate: g.
        density: share of the input channels in I.
        act: ``silu``, ``gelu`` or ``linear``; only the last can be merged.
        start_from: ``scratch`` or ``zero``.
    """

    rank: int = 8
    gate: float = 0.7
    density: float = 0.05
    act: Literal["silu", "gelu", "linear"] = "silu"
    start_from: Literal["scratch", "zero"] = "scratch"

    def validate(self) -> None:
        """Check the options."""
        if not 0 < self.gate < 1 or not 0 < self.density <= 1:
            raise ConfigError(
                f"adapter {self.name!r}: got gate={self.gate}, density={self.density}; expected 0 < gate < 1, 0 < "
                "density <= 1"
            )

    @property
    def algebra(self) -> Algebra:
        """The activation breaks every algebra."""
        return Algebra.MULTILINEAR if self.act == "linear" else Algebra.NONLINEAR

    @property
    def basis(self) -> Basis:
        """Channels chosen from the initial weight."""
        return Basis.WEIGHT

    @property
    def mergeable(self) -> bool:
        """Only without the activation."""
        return self.act == "linear"

    @property
    def starts_off_zero(self) -> bool:
        """From scratch, when the layer is the whole layer."""
        return self.start_from == "scratch"

    @property
    def replaces_base(self) -> bool:
        """From scratch."""
        return self.start_from == "scratch"

    def check(self, site: Site) -> None:
        """A bridge has nothing to replace; no grouped convolutions: the activation sits between the factors."""
        Method.check(self, site)
        _check_bridge(self.name, site, self.replaces_base)
        if site.groups != 1:
            raise ModelError(
                f"adapter {self.name!r} cannot sit on conv2d site {site.name!r} with groups={site.groups}; use "
                "'sltrain' there"
            )

    def _channels(self, site: Site) -> int:
        return max(1, math.floor(self.density * site.d_in))

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """``A`` ``(r, d_in)``, ``B`` ``(d_out, r)`` and ``W`` ``(d_out, |I|)``."""
        computed = Init("computed")
        first = computed if self.replaces_base else Init()
        return {
            "A": Leaf((self.rank, site.d_in), init=computed),
            "B": Leaf((site.d_out, self.rank), init=first),
            "W": Leaf((site.d_out, self._channels(site)), init=first),
        }

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """The channels I ``(|I|,)``."""
        return {"channels": Leaf((self._channels(site),), torch.int64, role="index")}

    def _parts(self, site: Site, seed: int, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the residual of the initial weight."""
        if weight is None:
            k = philox.key(seed, site.name, "W0")  # a layer from scratch has none, nor has a bridge
            weight = philox.uniform(k, (site.d_out, site.d_in), 1 / math.sqrt(site.d_in)).double()
        u, s, v = bases.top_svd(weight, self.rank, philox.key(seed, site.name, "svd"))
        root = s.sqrt()
        return root[:, None] * v.T, u * root, weight - (u * s) @ v.T

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Columns of the residual with the largest norms."""
        residual = self._parts(site, seed, weight)[2]
        order = torch.sort(residual.norm(dim=0), descending=True, stable=True).indices
        return {"channels": order[: self._channels(site)].clone()}

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """The factors, with the gate divided out, and the residual's chosen columns."""
        a, b, residual = self._parts(site, seed, weight)
        if name == "W":
            return residual[:, basis["channels"]] / (1 - self.gate)
        return a if name == "A" else b / self.gate

    def _sparse(self, site: Site, theta: Tensors, basis: Tensors) -> Tensor:
        dense = theta["W"].new_zeros(site.d_out, site.d_in)
        return (1 - self.gate) * dense.index_copy(1, basis["channels"], theta["W"])

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``g B A`` plus the chosen columns."""
        if self.act != "linear":
            raise ModelError(
                f"adapter {self.name!r} with act={self.act!r} at site {site.name!r} is not one matrix: it cannot "
                "be merged or "
                "exported as a delta; use act='linear'"
            )
        return self.gate * (theta["B"] @ theta["A"]) + self._sparse(site, theta, basis)

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """Both terms; linear sites and bridges gather their channels, others use the scattered columns."""
        z = sites.apply(site, x, theta["A"])
        if self.act != "linear":
            z = F.silu(z) if self.act == "silu" else F.gelu(z)
        dense = sites.second(site, z, theta["B"])
        if site.kind in ("linear", "bridge"):
            return self.gate * dense + (1 - self.gate) * F.linear(x[..., basis["channels"]], theta["W"])
        return self.gate * dense + sites.apply(site, x, self._sparse(site, theta, basis))

    def quiet(self, fresh: Tensors, theta: Tensors, basis: Tensors) -> None:
        """New columns of B start at zero."""
        fresh["B"].zero_()
