"""Orthonormal bases: from a weight's singular vectors, from a seed, and how they grow.

Everything is computed on the CPU in float64 and stored in float32. Still, an SVD's signs and a QR's last
bits depend on the linear-algebra library, so these bases are computed once and shipped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fednano.adapters import philox
from fednano.adapters.protocol import Site
from fednano.errors import ConfigError

__all__ = ["complete", "orthonormal", "require_fit", "require_stat", "singular", "top_svd"]

_EXACT = 1024  # above this many rows and columns a truncated SVD is found by subspace iteration
_OVERSAMPLE, _ITERATIONS = 8, 16


def orthonormal(k: int, d: int, count: int) -> Tensor:
    """Return ``(d, count)`` float64 orthonormal columns drawn from a key; fewer columns are the first of more."""
    return complete(torch.empty(d, 0, dtype=torch.float64), k, count)


def complete(columns: Tensor, k: int, count: int) -> Tensor:
    """Extend orthonormal columns by seeded ones, orthogonal to them and to each other.

    Args:
        columns: ``(d, c)``.
        k: 64-bit key of the new columns.
        count: number of columns wanted, at most d.

    Returns:
        ``(d, count)`` float64; the first c are ``columns``.
    """
    d, have = columns.shape
    fresh = philox.uniform(k, (count, d)).double().T[:, have:]
    q, r = torch.linalg.qr(torch.cat([columns.double(), fresh], dim=1))
    q = q * r.diagonal().sign().where(r.diagonal() != 0, torch.ones((), dtype=torch.float64))
    return torch.cat([columns.double(), q[:, have:]], dim=1)


def top_svd(matrix: Tensor, rank: int, k: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular triplets; each left vector's largest entry is positive.

    Args:
        matrix: ``(m, n)``.
        rank: number of triplets.
        k: 64-bit key of the start of the subspace iteration that large matrices use.

    Returns:
        U ``(m, rank)``, S ``(rank,)`` and V ``(n, rank)`` in float64.
    """
    matrix = matrix.detach().double().cpu()
    if max(matrix.shape) <= _EXACT or 4 * rank >= min(matrix.shape):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        q = orthonormal(k, matrix.shape[1], min(rank + _OVERSAMPLE, *matrix.shape))
        for _ in range(_ITERATIONS):
            q = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ q).Q).Q
        u, s, small = torch.linalg.svd(matrix @ q, full_matrices=False)
        vh = small @ q.T
    u, s, v = u[:, :rank], s[:rank], vh[:rank].T
    top = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * top, s, v * top


def singular(site: Site, weight: Tensor | None, seed: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of a site's weight; without a weight (a bridge is the identity, whose singular vectors are any
    orthonormal set) seeded orthonormal vectors and singular values 1.

    Args:
        site: the site.
        weight: ``(d_out, d_in)`` or None.
        seed: the run's seed.
        rank: number of triplets.

    Returns:
        U ``(d_out, rank)``, S ``(rank,)``, V ``(d_in, rank)`` in float64. At a bridge U equals V.
    """
    if weight is not None:
        return top_svd(weight, rank, philox.key(seed, site.name, "svd"))
    v = orthonormal(philox.key(seed, site.name, "V"), site.d_in, rank)
    same = site.kind == "bridge"
    u = v.clone() if same else orthonormal(philox.key(seed, site.name, "U"), site.d_out, rank)
    return u, torch.ones(rank, dtype=torch.float64), v


def require_stat(adapter: str, site: Site, stats: Mapping[str, Tensor] | None, name: str) -> Tensor:
    """Return ``stats[name]`` as ``(d_out, d_in)`` float64 on the CPU.

    Raises:
        ConfigError: it is missing, of another shape, or not finite.
    """
    if stats is None or name not in stats:
        raise ConfigError(
            f"adapter {adapter!r} at site {site.name!r} needs stats[{name!r}] of shape ({site.d_out}, "
            f"{site.d_in}); got "
            f"{sorted(stats) if stats else 'no statistics'}. Gather them first, see fednano.adapters.stats"
        )
    value = stats[name].detach().double().cpu()
    if tuple(value.shape) != (site.d_out, site.d_in) or not bool(torch.isfinite(value).all()):
        raise ConfigError(
            f"adapter {adapter!r} at site {site.name!r}: got stats[{name!r}] of shape {tuple(value.shape)}"
            f"{'' if bool(torch.isfinite(value).all()) else ' with NaN or Inf'}; expected finite "
            f"({site.d_out}, {site.d_in})"
        )
    return value


def require_fit(adapter: str, option: str, value: int, site: Site) -> None:
    """Raise ConfigError if ``value`` exceeds the number of entries of the site's matrix."""
    if value > site.d_in * site.d_out:
        raise ConfigError(
            f"adapter {adapter!r}: got {option}={value} at site {site.name!r}; expected at most "
            f"d_in * d_out = {site.d_in * site.d_out}"
        )
