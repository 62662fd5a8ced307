"""LoCA (arXiv 2502.06820): a change that is sparse in the two-dimensional cosine domain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fednano.adapters import bases, philox, sites
from fednano.adapters.method import Method
from fednano.adapters.protocol import Algebra, Basis, Leaf, Site, Tensors
from fednano.adapters.registry import register

__all__ = ["LoCA", "dct_rows", "location_gradient"]


def dct_rows(n: int, frequencies: Tensor) -> Tensor:
    """Rows of the orthonormal DCT-II matrix: ``C[k, j] = c_k cos(pi (2 j + 1) k / (2 n))``.

    Args:
        n: length of the transform.
        frequencies: ``(m,)`` int64, the rows k.

    Returns:
        ``(m, n)`` float64.
    """
    j = torch.arange(n, dtype=torch.int64, device=frequencies.device)
    turn = ((2 * j[None, :] + 1) * frequencies[:, None]) % (4 * n)  # reduced exactly before it is rounded
    rows = torch.cos(turn.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
    return torch.where(frequencies[:, None] == 0, torch.full_like(rows, 1 / math.sqrt(n)), rows)


@register("loca")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoCA(Method):
    """``delta = alpha C_o^T scatter(a) C_i`` with DCT matrices C and a from zero. Parameters: ``count``.

    The paper lets the locations move in a first phase, by central differences of the gradient's DCT
    (`location_gradient`). An index cannot be averaged over clients, so here the server chooses the
    locations and ships them: the largest entries of the DCT of an aggregated gradient, or random ones;
        between rounds it may move them.

    Attributes:
        count: number of coefficients.
        alpha: factor before the change.
        locations: ``random``; or ``gradient``, the largest entries of ``|C_o G C_i^T|``.
    """

    size_option: ClassVar[str] = "count"

    count: int = 64
    alpha: float = 1.0
    locations: Literal["random", "gradient"] = "random"

    @property
    def algebra(self) -> Algebra:
        """Linear in a, as long as the locations stay."""
        return Algebra.AFFINE

    @property
    def basis(self) -> Basis:
        """Where the locations come from."""
        return Basis.SEED if self.locations == "random" else Basis.STATS

    def check(self, site: Site) -> None:
        """Cap the count at the number of frequencies."""
        super().check(site)
        bases.require_fit(self.name, "count", self.count, site)

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """a ``(count,)``."""
        return {"a": Leaf((self.count,))}

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """Locations ``(count,)`` in the row-major ``(d_out, d_in)`` spectrum."""
        return {"positions": Leaf((self.count,), torch.int64, role="index")}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Choose the locations, most important first.

        Raises:
            ConfigError: ``locations="gradient"`` and no gradient was given.
        """
        if self.locations == "random":
            k = philox.key(seed, site.name, "positions")
            return {"positions": philox.sample(k, site.d_in * site.d_out, self.count)}
        gradient = bases.require_stat(self.name, site, stats, "gradient")
        spectrum = _spectrum(gradient).abs().flatten()
        return {"positions": torch.sort(spectrum, descending=True, stable=True).indices[: self.count].clone()}

    def extend(self, site: Site, basis: Tensors, weight: Tensor | None, seed: int) -> Tensors:
        """Old locations first, then seeded ones."""
        old, entries = basis["positions"], site.d_in * site.d_out
        name = "positions" if self.locations == "random" else "more"
        more = philox.sample(philox.key(seed, site.name, name), entries, min(entries, self.count + len(old)))
        return {"positions": torch.cat([old, more[~torch.isin(more, old)]])[: self.count]}

    def derive(self, site: Site, basis: Tensors) -> Tensors:
        """The DCT rows that the locations use: ``(count, d_out)`` and ``(count, d_in)``."""
        rows, columns = basis["positions"] // site.d_in, basis["positions"] % site.d_in
        return {"out": dct_rows(site.d_out, rows).float(), "in": dct_rows(site.d_in, columns).float()}

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``alpha sum_b a_b C_o[row_b]^T C_i[column_b]``."""
        return self.alpha * ((basis["out"].T * theta["a"]) @ basis["in"])

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``count`` cosine features of x, weighed and added up; cheaper than the dense change while count < d."""
        return self.alpha * sites.low_rank(site, x, basis["in"], basis["out"].T, theta["a"])


def _spectrum(matrix: Tensor) -> Tensor:
    """Two-dimensional DCT-II of ``(m, n)``, float64."""
    m, n = matrix.shape
    return dct_rows(m, torch.arange(m)) @ matrix.double() @ dct_rows(n, torch.arange(n)).T


def location_gradient(gradient: Tensor, a: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's gradient of the loss with respect to real-valued locations.

    Half the coefficient times the central difference of the gradient's DCT, clamped to [-1, 1]; zero beyond the border.

    Args:
        gradient: ``(d_out, d_in)``, of the loss with respect to the dense change.
        a: ``(n,)`` coefficients.
        positions: ``(n,)`` int64 locations.

    Returns:
        Gradients with respect to rows and columns, each ``(n,)`` float64.
    """
    d_in = gradient.shape[1]
    spectrum = torch.nn.functional.pad(_spectrum(gradient), (1, 1, 1, 1))
    row, column = positions // d_in + 1, positions % d_in + 1
    half = a.double() / 2
    by_row = half * (spectrum[row + 1, column] - spectrum[row - 1, column])
    by_column = half * (spectrum[row, column + 1] - spectrum[row, column - 1])
    return by_row.clamp(-1, 1), by_column.clamp(-1, 1)
