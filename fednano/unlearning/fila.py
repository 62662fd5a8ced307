"""FILA: start low-rank unlearning where the forget set's knowledge sits (LoKU: Cha et al., arXiv 2408.06621).

Rows of a weight ``W`` ``(d_out, d_in)`` are weighed by how much more the forget set depends on them than the retained
data, by the ratio of their diagonal Fishers::

    d_i^2 = sum_j F_forget[i, j] / (F_retain[i, j] + eps)
    min over rank r of || diag(d) (W - B A) ||_F^2

which truncating the singular value decomposition ``diag(d) W = U S V^T`` solves in closed form (Eckart and Young):
``A0 = sqrt(S) V^T``, ``B0 = diag(1/d) U sqrt(S)``. The published code then replaces ``W`` by ``W - B0 A0`` and trains
``B A`` from there. Here ``W`` is never written: the change is the pair of rank 2r ``[B, -B0] [A; A0]``, which is zero
at the start and whose second half stays frozen. Saved, it is an ordinary LoRA of rank 2r.

Three things differ from the published code, each on purpose:

- The Fisher is per sample, not the square of a batch's mean gradient, which shrinks as the batch grows.
- ``eps`` is a share of the mean of ``F_retain``, not 1e-5: squared gradients of an LLM lie far below that, and the
  retained data would not count. Now the weights do not change when either Fisher is multiplied by a constant.
- ``d`` is kept within a factor of its mean, so that no row is divided by almost nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fednano.adapters import AdapterSet, LoRA, Site, attach, sites_of
from fednano.adapters import sites as site_maths
from fednano.adapters.lora import Scaled
from fednano.adapters.protocol import Algebra, Basis, Init, Kind, Leaf, Tensors
from fednano.errors import ConfigError, DataError, ModelError
from fednano.unlearning.fisher import FLOOR, row_weights

__all__ = [
    "Fila",
    "Pair",
    "as_lora",
    "attach_fila",
    "factorise",
    "factorise_product",
]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two factors of one matrix ``B A``.

    Attributes:
        A: ``(r, d_in)``.
        B: ``(d_out, r)``.
    """

    A: Tensor
    B: Tensor

    def matrix(self) -> Tensor:
        """``B A``, ``(d_out, d_in)``."""
        return self.B @ self.A


def factorise(weight: Tensor, rows: Tensor, rank: int) -> Pair:
    """The rank-``rank`` matrix nearest to ``weight`` when its rows count ``rows``, as balanced factors.

    Signs are fixed (the largest entry of each left singular vector is positive), because libraries differ in them.

    Args:
        weight: ``(d_out, d_in)``.
        rows: ``(d_out,)`` positive.
        rank: at least 1.

    Returns:
        float64 factors on the CPU.

    Raises:
        ConfigError: ``rank`` is out of range.
    """
    weight, rows = weight.detach().double().cpu(), rows.double().cpu()
    if not 1 <= rank <= min(weight.shape):
        raise ConfigError(
            f"FILA got rank {rank} for a weight of shape {tuple(weight.shape)}; expected 1 to {min(weight.shape)}."
        )
    left, values, right = torch.linalg.svd(rows[:, None] * weight, full_matrices=False)
    return _balanced(left[:, :rank], values[:rank], right[:rank], rows)


def factorise_product(left: Tensor, right: Tensor, rows: Tensor, rank: int) -> tuple[Pair, Pair]:
    """`factorise` of ``left @ right``, and what is left over, without forming the product.

    Args:
        left: ``(d_out, k)``.
        right: ``(k, d_in)``.
        rows: ``(d_out,)`` positive.
        rank: at least 1, at most ``k``.

    Returns:
        The nearest factors of rank ``rank``, and factors of rank ``k - rank`` of the rest: both together are exactly
        the product, so that an adapter of rank ``k`` holds them. float64, on the CPU.

    Raises:
        ConfigError: ``rank`` is out of range.
    """
    left, right, rows = left.detach().double().cpu(), right.detach().double().cpu(), rows.double().cpu()
    size = left.shape[1]
    if not 1 <= rank <= size:
        raise ConfigError(f"FILA got rank {rank} for an adapter of rank {size}; expected 1 to {size}.")
    q_left, r_left = torch.linalg.qr(rows[:, None] * left)  # (d_out, m), (m, k)
    q_right, r_right = torch.linalg.qr(right.T)  # (d_in, n), (n, k)
    u, values, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    missing = size - len(values)  # a side of the matrix may be below k; the components beyond it are zero
    u = torch.nn.functional.pad(q_left @ u, (0, missing))
    vh = torch.nn.functional.pad(vh @ q_right.T, (0, 0, 0, missing))
    values = torch.nn.functional.pad(values, (0, missing))
    first = _balanced(u[:, :rank], values[:rank], vh[:rank], rows)
    return first, _balanced(u[:, rank:], values[rank:], vh[rank:], rows)


def _balanced(left: Tensor, values: Tensor, right: Tensor, rows: Tensor) -> Pair:
    if len(values):
        largest = left.abs().argmax(dim=0)
        sign = left[largest, torch.arange(left.shape[1])].sign()
        left, right = left * sign, right * sign[:, None]
    root = values.sqrt()
    return Pair(root[:, None] * right, (left * root) / rows[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fila(Scaled):
    """``delta = s (B A - B0 A0)`` at a linear site: A, B ``(r, d_in), (d_out, r)`` start at the frozen A0, B0.

    Not in the registry: it lives as long as the unlearning does, and is kept as a LoRA by `as_lora`.
    """

    name: ClassVar[str] = "fila"
    kinds: ClassVar[frozenset[Kind]] = frozenset(("linear",))

    @property
    def algebra(self) -> Algebra:
        """A product of two trained factors."""
        return Algebra.MULTILINEAR

    @property
    def basis(self) -> Basis:
        """The frozen pair comes from the weight and the row weights, and is shipped."""
        return Basis.STATS

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """``A`` and ``B``, which start as the frozen pair."""
        return {
            "A": Leaf((self.rank, site.d_in), init=Init("computed")),
            "B": Leaf((site.d_out, self.rank), init=Init("computed")),
        }

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """``A0`` and ``B0``."""
        return {
            "A0": Leaf((self.rank, site.d_in), role="frozen"),
            "B0": Leaf((site.d_out, self.rank), role="frozen"),
        }

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Factorise the weight by ``stats["rows"]`` ``(d_out,)``; see `row_weights`."""
        if weight is None or not stats or "rows" not in stats:
            raise ModelError(
                f"FILA at site {site.name!r} needs the site's weight and the statistics 'rows'; use attach_fila."
            )
        pair = factorise(weight, stats["rows"], self.rank)
        root = math.sqrt(self.scale)
        return {"A0": (pair.A / root).float(), "B0": (pair.B / root).float()}

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """A starts at A0, B at B0."""
        return basis[f"{name}0"]

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s (B A - B0 A0)``."""
        return self.scale * (theta["B"] @ theta["A"] - basis["B0"] @ basis["A0"])

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s (B A x - B0 A0 x)``: the same operations twice, so the difference at the start is zero to the bit."""
        moving = site_maths.low_rank(site, x, theta["A"], theta["B"])
        return self.scale * (moving - site_maths.low_rank(site, x, basis["A0"], basis["B0"]))


def attach_fila(
    model: nn.Module,
    patterns: str | Sequence[str],
    forget: Mapping[str, Tensor],
    retain: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float | None = None,
    floor: float = FLOOR,
    seed: int = 0,
) -> AdapterSet:
    """Put FILA adapters on linear layers; the model computes what it computed before, bit for bit.

    Args:
        model: any module with materialised weights; they are frozen and never written.
        patterns: see `fednano.adapters.select`.
        forget: site name to the forget set's Fisher ``(d_out, d_in)``, from `weight_fisher` of the site's weight.
        retain: the same of retained data.
        rank: r of the trained pair; what is kept in the end has rank 2r.
        alpha: numerator of the scale ``alpha / r``; ``None`` makes it 1.
        floor: see `FLOOR`.
        seed: of the adapter set.

    Raises:
        DataError: a site has no Fisher.
        ConfigError: a site cannot hold the pair of rank 2r.
        ModelError: a site is not linear, or cannot carry an adapter.
    """
    stats = {}
    for site in sites_of(model, patterns):
        if 2 * rank > site.full_rank:
            raise ConfigError(
                f"FILA of rank {rank} is kept as a pair of rank {2 * rank}, but site {site.name!r} has full rank "
                f"{site.full_rank}. Choose a rank up to {site.full_rank // 2}, or leave the site out."
            )
        if site.name not in forget or site.name not in retain:
            raise DataError(f"there is no Fisher for site {site.name!r}; compute one with weight_fisher.")
        stats[site.name] = {"rows": row_weights(forget[site.name], retain[site.name], floor=floor)}
    return attach(model, Fila(rank=rank, alpha=alpha), patterns, seed=seed, stats=stats)


def as_lora(adapters: AdapterSet) -> None:
    """Turn FILA layers, in place, into LoRAs of rank 2r with the same change: ``[B, -B0]`` and ``[A; A0]``.

    They are then saved and loaded like any adapter, onto the unchanged model.

    Raises:
        ModelError: a layer carries another adapter.
    """
    for layer in adapters.layers.values():
        if not isinstance(layer.adapter, Fila):
            raise ModelError(f"site {layer.site.name!r} carries {layer.adapter.spec}, which is no FILA.")
    for layer in adapters.layers.values():
        adapter, basis = layer.adapter, layer.basis
        assert isinstance(adapter, Fila)
        theta = {name: value.detach() for name, value in layer.theta.items()}
        joined = {
            "A": torch.cat([theta["A"], basis["A0"]]),
            "B": torch.cat([theta["B"], -basis["B0"]], dim=1),
        }
        rank = 2 * adapter.rank
        layer.adopt(LoRA(rank=rank, alpha=adapter.scale * rank), joined, {})
