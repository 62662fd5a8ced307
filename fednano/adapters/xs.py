"""A small trained middle between two frozen orthonormal factors: LoRA-XS, LoRA-SB, SVFit, LoLDU.

All four are ``delta = s B M A`` with M the only trained part, a full r x r matrix or a diagonal, so
updates average exactly and cost r^2 or r numbers whatever the width of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fednano.adapters import bases, philox, sites
from fednano.adapters.fused import LowRank
from fednano.adapters.lora import Scaled
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError

__all__ = ["LoLDU", "LoRASB", "LoRAXS", "SVFit", "rank_for_energy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Middle(Scaled):
    """``delta = s B M A``: basis leaves A ``(r, d_in)`` and B ``(d_out, r)``, one trained leaf for M."""

    @property
    def algebra(self) -> Algebra:
        """Affine in M."""
        return Algebra.AFFINE

    @property
    def basis(self) -> Basis:
        """From the weight unless the method says otherwise."""
        return Basis.WEIGHT

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """A ``(r, d_in)`` and B ``(d_out, r)``."""
        return {
            "A": Leaf((self.rank, site.d_in), role="frozen"),
            "B": Leaf((site.d_out, self.rank), role="frozen"),
        }

    def middle(self, theta: Tensors, basis: Tensors) -> Tensor:
        """M: ``(r, r)``, or its diagonal ``(r,)``."""
        return theta["R"]

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B M A``."""
        m = self.middle(theta, basis)
        left = basis["B"] * m if m.dim() == 1 else basis["B"] @ m
        return self.scale * (left @ basis["A"])

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B M (A x)``."""
        return self.scale * sites.low_rank(site, x, basis["A"], basis["B"], self.middle(theta, basis))

    def low_rank_form(self, theta: Tensors, basis: Tensors) -> LowRank:
        """A, B, s and M."""
        return LowRank(basis["A"], basis["B"], self.scale, mix=self.middle(theta, basis))


@register("lora-xs")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAXS(_Middle):
    """LoRA-XS (arXiv 2405.17604): ``delta = s U_r R S_r V_r^T`` with the weight's top singular triplets
    frozen. Parameters: ``r^2``.

    The singular values sit on A's side, as in the authors' code. The paper draws R from N(0, 1e-5^2); R = 0 is the
    default here, so that the layer starts exactly as its base (R's gradient does not vanish there).

    Attributes:
        sigma: standard deviation of R's start.
        source: ``weight``; or ``seed`` for the variant with a random basis, which needs no weight and no
            shipping: uniform entries with columns of A and B of norm 1 in the mean (an exact QR would not
                give the same bits everywhere).
    """

    sigma: float = 0.0
    source: Literal["weight", "seed"] = "weight"

    @property
    def basis(self) -> Basis:
        """From the weight, or seeded."""
        return Basis.WEIGHT if self.source == "weight" else Basis.SEED

    @property
    def starts_off_zero(self) -> bool:
        """With a random R."""
        return self.sigma > 0

    def validate(self) -> None:
        """Check the options."""
        if self.sigma < 0:
            raise ConfigError(f"adapter {self.name!r}: got sigma={self.sigma}; expected sigma >= 0")

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """R ``(r, r)``."""
        init = Init("normal", self.sigma) if self.sigma else Init()
        return {"R": Leaf((self.rank, self.rank), init=init)}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """``A = S_r V_r^T``, ``B = U_r``; without a weight the identity's; or seeded uniform entries."""
        if self.source == "weight":
            u, s, v = bases.singular(site, weight, seed, self.rank)
            return {"A": (s[:, None] * v.T).float(), "B": u.float()}
        bound_a, bound_b = (3 / site.d_in) ** 0.5, (3 / site.d_out) ** 0.5
        return {
            "A": philox.uniform(philox.key(seed, site.name, "A"), (self.rank, site.d_in), bound_a),
            "B": philox.uniform(
                philox.key(seed, site.name, "B"), (self.rank, site.d_out), bound_b
            ).T.contiguous(),
        }

    def quiet(self, fresh: Tensors, theta: Tensors, basis: Tensors) -> None:
        """New entries of R start at zero."""
        fresh["R"].zero_()


@register("lora-sb")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRASB(_Middle):
    """LoRA-SB (arXiv 2411.19557): LoRA-XS in the basis of the first full fine-tuning step. Parameters: ``r^2``.

    The step is approximated by ``dW = -step * sign(G)`` with G the summed gradient of some samples; ``U_r
    S_r V_r^T`` of dW gives ``B = U_r``, ``A = V_r^T`` and the start ``R = diag(S_r)``: the layer starts at
    the best rank-r approximation of that step, not at its base. In a federation G is summed over clients
    once, the server computes the basis and ships it; that one round reveals a dense gradient sum, unlike
    the later ones.

    Attributes:
        step: size of the approximated step: the learning rate over (warm-up ratio x steps) in the paper.
    """

    step: float = 1e-4

    @property
    def basis(self) -> Basis:
        """From gradients."""
        return Basis.STATS

    @property
    def starts_off_zero(self) -> bool:
        """At the update approximation."""
        return True

    def validate(self) -> None:
        """Check the options."""
        if not self.step > 0:
            raise ConfigError(f"adapter {self.name!r}: got step={self.step}; expected step > 0")

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """R ``(r, r)``, from ``diag(S_r)``."""
        return {"R": Leaf((self.rank, self.rank), init=Init("computed"))}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """A, B and the start's singular values S ``(r,)``."""
        return {**super().frozen(site), "S": Leaf((self.rank,), role="frozen")}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Truncated SVD of ``-step * sign(stats["gradient"])``.

        Raises:
            ConfigError: no gradient was given.
        """
        gradient = bases.require_stat(self.name, site, stats, "gradient")
        u, s, v = bases.top_svd(-self.step * gradient.sign(), self.rank, philox.key(seed, site.name, "svd"))
        # U S V^T is what the layer starts at: fold alpha's scale into R, so that s R = S.
        return {"A": v.T.float().contiguous(), "B": u.float(), "S": (s / self.scale).float()}

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``diag(S)``."""
        return torch.diag(basis["S"])

    def extend(self, site: Site, basis: Tensors, weight: Tensor | None, seed: int) -> Tensors:
        """Grow by seeded directions orthogonal to the old ones, with S = 0: the gradients are gone by then."""
        a = bases.complete(basis["A"].T, philox.key(seed, site.name, "V"), self.rank)
        b = bases.complete(basis["B"], philox.key(seed, site.name, "U"), self.rank)
        s = torch.zeros(self.rank)
        s[: len(basis["S"])] = basis["S"]
        return {"A": a.T.float().contiguous(), "B": b.float(), "S": s}


@register("svfit")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SVFit(_Middle):
    """SVFit (arXiv 2409.05926): train the top singular values. ``delta = U_r diag(sigma - S_r) V_r^T``.
    Parameters: ``r``.

    The paper keeps the r that holds 99 % of the spectrum's energy, hundreds: see `rank_for_energy`.
    """

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """sigma ``(r,)``, from the singular values."""
        return {"sigma": Leaf((self.rank,), init=Init("computed"))}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """``A = V_r^T``, ``B = U_r`` and S ``(r,)``."""
        return {**super().frozen(site), "S": Leaf((self.rank,), role="frozen")}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Top singular triplets of the weight; without one, of the identity."""
        u, s, v = bases.singular(site, weight, seed, self.rank)
        return {"A": v.T.float().contiguous(), "B": u.float(), "S": s.float()}

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``S``."""
        return basis["S"]

    def middle(self, theta: Tensors, basis: Tensors) -> Tensor:
        """``sigma - S``."""
        return theta["sigma"] - basis["S"]


@register("loldu")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoLDU(_Middle):
    """LoLDU (arXiv 2410.13618): train the top of D in ``W = P L D U``. Parameters: ``r``.

    ``delta = c P L[:, :r] diag(z - D_r) U[:r]`` with z from D_r and c = alpha / r. Each row of the echelon
    factor is divided by its pivot; where the pivot is below 1e-3 of the row's largest entry, by that entry
    instead (the paper's division would blow up; any nonzero divisor gives the same product ``D U``).
    Without a weight L and U are seeded orthonormal and D = 1.
    """

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """z ``(r,)``, from D."""
        return {"z": Leaf((self.rank,), init=Init("computed"))}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """``A = U[:r]``, ``B = (P L)[:, :r]`` and D ``(r,)``."""
        return {**super().frozen(site), "D": Leaf((self.rank,), role="frozen")}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """LU decomposition with partial pivoting."""
        if weight is None:
            u, s, v = bases.singular(site, None, seed, self.rank)
            return {"A": v.T.float().contiguous(), "B": u.float(), "D": s.float()}
        p, lower, upper = torch.linalg.lu(weight)
        rows = upper[: self.rank]
        pivot, largest = rows.diagonal(), rows.abs().amax(1)
        d = torch.where(pivot.abs() < 1e-3 * largest, largest, pivot)
        d = torch.where(d == 0, torch.ones_like(d), d)
        return {
            "A": (rows / d[:, None]).float(),
            "B": (p @ lower[:, : self.rank]).float(),
            "D": d.float(),
        }

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``D``."""
        return basis["D"]

    def middle(self, theta: Tensors, basis: Tensors) -> Tensor:
        """``z - D``."""
        return theta["z"] - basis["D"]


def rank_for_energy(weight: Tensor, share: float = 0.99) -> int:
    """Smallest rank whose singular values hold a share of the squared spectrum.

    Args:
        weight: ``(m, n)``.
        share: in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"rank_for_energy: got share={share}; expected 0 < share <= 1")
    energy = torch.linalg.svdvals(weight.double()).square().cumsum(0)
    return int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1
