"""LaMDA (arXiv 2406.12832): a small square matrix between frozen singular vectors, one of which is trained for a
while first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fednano.adapters import bases, sites
from fednano.adapters.lora import Scaled
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError

__all__ = ["LaMDA", "frozen_columns"]


@register("lamda")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LaMDA(Scaled):
    """``delta = s B S A``: A frozen, S ``(r, r)`` trained from zero, B's columns trained first and frozen one after
    the other.

    A and B start from the weight's top singular vectors. Parameters: ``r d_out + r^2`` in the first phase
    (``frozen_columns=0``), down to ``r^2`` in the second (``frozen_columns=rank``), where updates average exactly.
    The frozen count belongs to the round, not to the
    client: the server sends it (`frozen_columns`), and everybody calls `advance` on the aggregated B.

    The authors' code computes the number of frozen columns by an integer division that makes it jump; the rule here
    is the paper's: all r columns are frozen after a share of the training, linearly, the largest singular value first.

    Attributes:
        frozen_columns: how many columns of B are frozen.
    """

    frozen_columns: int = 0

    def validate(self) -> None:
        """Check the options."""
        if not 0 <= self.frozen_columns <= self.rank:
            raise ConfigError(
                f"adapter {self.name!r}: got frozen_columns={self.frozen_columns}; expected 0 to rank={self.rank}"
            )

    @property
    def algebra(self) -> Algebra:
        """A product while B is trained, then affine in S."""
        return Algebra.MULTILINEAR if self._trains_b and not self.personal else Algebra.AFFINE

    @property
    def _trains_b(self) -> bool:
        return self.frozen_columns < self.rank

    @property
    def basis(self) -> Basis:
        """From the weight."""
        return Basis.WEIGHT

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """S ``(r, r)`` and the columns of B that are still trained ``(d_out, r - frozen_columns)``."""
        leaves = {"S": Leaf((self.rank, self.rank))}
        if self._trains_b:
            leaves["B"] = Leaf((site.d_out, self.rank - self.frozen_columns), init=Init("computed"))
        return leaves

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """``A`` ``(r, d_in)`` and ``U`` ``(d_out, r)``, whose first columns are B's frozen ones."""
        return {
            "A": Leaf((self.rank, site.d_in), role="frozen"),
            "U": Leaf((site.d_out, self.rank), role="frozen"),
        }

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Top singular vectors of the weight; without one, of the identity."""
        u, _, v = bases.singular(site, weight, seed, self.rank)
        return {"A": v.T.float().contiguous(), "U": u.float()}

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """The trained columns of B start as singular vectors."""
        return basis["U"][:, self.frozen_columns :]

    def _b(self, theta: Tensors, basis: Tensors) -> Tensor:
        kept = basis["U"][:, : self.frozen_columns]
        return torch.cat([kept, theta["B"]], dim=1) if self._trains_b else kept

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B S A``."""
        return self.scale * (self._b(theta, basis) @ theta["S"] @ basis["A"])

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B (S (A x))``; only ``A x`` is saved for the backward pass, not x."""
        return self.scale * sites.low_rank(site, x, basis["A"], self._b(theta, basis), theta["S"])

    @property
    def resizable(self) -> bool:
        """While no column is frozen, or all are."""
        return self.frozen_columns in (0, self.rank)

    def resized(self, rank: int) -> LaMDA:
        """Another rank in the same phase; s stays."""
        alpha = None if self.alpha is None else self.scale * rank
        return dataclasses.replace(self, rank=rank, alpha=alpha, frozen_columns=0 if self._trains_b else rank)

    def advance(self, theta: Tensors, basis: Tensors, frozen: int) -> tuple[LaMDA, Tensors, Tensors]:
        """Freeze more columns of B at their present values; the function does not change.

        Args:
            theta: trainable leaves.
            basis: frozen leaves.
            frozen: how many columns are to be frozen, at least as many as now.

        Returns:
            ``(adapter, theta, basis)`` for `AdapterLayer.adopt`.

        Raises:
            ConfigError: fewer columns than are frozen already.
        """
        if frozen < self.frozen_columns:
            raise ConfigError(
                f"adapter {self.name!r}: got {frozen} frozen columns, {self.frozen_columns} are frozen already; "
                "columns do not thaw"
            )
        other = dataclasses.replace(self, frozen_columns=frozen)
        whole = basis["U"].clone()
        if self._trains_b:
            fresh = theta["B"][:, : frozen - self.frozen_columns]
            whole[:, self.frozen_columns : frozen] = fresh.to(whole.dtype)
        leaves = {"S": theta["S"]}
        if other._trains_b:
            leaves["B"] = theta["B"][:, frozen - self.frozen_columns :]
        return other, leaves, {"A": basis["A"], "U": whole}


def frozen_columns(step: int, steps: int, rank: int, share: float = 0.3) -> int:
    """Columns of B that are frozen at a step: linear, all of them from ``share * steps`` on.

    Args:
        step: the present step or round, from 0.
        steps: how many there will be.
        rank: r.
        share: when the last column is frozen, as a share of the training.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"frozen_columns: got share={share}; expected 0 < share <= 1")
    return min(rank, int(rank * step / max(1.0, share * steps)))
