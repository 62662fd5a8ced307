"""Sums of low-rank products without ever forming a ``(m, n)`` matrix.

``sum_k c_k L_k R_k`` is one product of stacked factors, ``[c_1 L_1 ... c_K L_K] [R_1; ...; R_K]`` with inner size
``q = sum_k r_k``. Thin QR of both stacks leaves a ``(q, q)`` core whose SVD is the SVD of the sum: O((m + n)
q**2 + q**3) instead of O(m n min(m, n)). Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import scipy.linalg
import torch
from torch import Tensor

__all__ = ["factor", "inner", "pad_rank", "stack", "truncated_svd"]

Term = tuple[float, Tensor, Tensor]
"""A coefficient, a left factor ``(m, r)`` and a right factor ``(r, n)``."""

_DIRECT = 512  # up to this core size a full SVD is fast and loses no digits


def stack(terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """One product equal to the sum of the terms.

    Args:
        terms: coefficient, left ``(m, r_k)``, right ``(r_k, n)``; ranks may differ.

    Returns:
        Left ``(m, q)`` with the coefficients in it, and right ``(q, n)``, float64.
    """
    left = torch.cat([coefficient * left.double() for coefficient, left, _ in terms], dim=1)
    return left, torch.cat([r.double() for _, _, r in terms], dim=0)


def truncated_svd(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of ``left @ right``.

    Cores up to 512 (or when most of the spectrum is asked for) get a full SVD. Larger ones get the leading
    eigenvectors of the Gram matrix of the core, about twice as fast; singular values below 1e-8 of the first are then
    noise.

    Args:
        left: ``(m, q)``.
        right: ``(q, n)``.
        rank: how many; fewer come back when m, n or q is smaller.

    Returns:
        U ``(m, k)``, S ``(k,)`` descending, Vt ``(k, n)``, float64, ``k = min(rank, m, n, q)``. The largest
        entry of each row of Vt is positive, so that signs do not depend on the library.
    """
    left, right = left.double(), right.double()
    q = min(left.shape[1], left.shape[0], right.shape[1])
    k = min(rank, q)
    basis, triangle = torch.linalg.qr(right.T)  # (n, q'), (q', q): right = triangle^T basis^T
    if q <= _DIRECT or 4 * k > q:
        column, upper = torch.linalg.qr(left)
        u, s, vt = torch.linalg.svd(upper @ triangle.T)
        u, s, vt = column @ u[:, :k], s[:k], vt[:k] @ basis.T
    else:
        core = triangle @ (left.T @ left) @ triangle.T
        size = core.shape[0]
        _, vectors = scipy.linalg.eigh(core.numpy(), subset_by_index=[size - k, size - 1])
        v = basis @ torch.from_numpy(vectors)  # (n, k), the leading right singular vectors, ascending
        u, s, rotation = torch.linalg.svd(left @ (right @ v), full_matrices=False)
        vt = rotation @ v.T
    top = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).double()
    return u * sign.T, s, vt * sign


def factor(
    u: Tensor, s: Tensor, vt: Tensor, rank: int, follow: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split ``U diag(S) Vt`` into two factors of a given rank; their product is exact whichever split is chosen.

    Without ``follow``, each side gets the roots of the singular values. With it, the right factor is made as
    close to ``follow`` as the product allows: its rows are ``follow`` projected on the row space of the
    product, and what rank is left over continues along ``follow`` with zeros on the left. So a LoRA whose B is
    still zero keeps its A, and optimiser steps of the next round start from factors of the size the clients are
    used to.

    Args:
        u: ``(m, k)``.
        s: ``(k,)`` descending.
        vt: ``(k, n)``.
        rank: of the factors, at least k.
        follow: ``(rank, n)`` or None.

    Returns:
        Left ``(m, rank)`` and right ``(rank, n)``.
    """
    m, n, k = u.shape[0], vt.shape[1], s.shape[0]
    if follow is not None and tuple(follow.shape) == (rank, n) and rank <= n:
        follow = follow.double()
        alive = int((s > 1e-12 * s[0]).sum()) if k and float(s[0]) > 0.0 else 0
        rows = vt[:alive]
        rest = follow - (follow @ rows.T) @ rows
        extra = torch.linalg.svd(rest, full_matrices=False).Vh[: rank - alive]
        basis = torch.cat([rows, extra])  # (rank, n), orthonormal
        turn = follow @ basis.T  # (rank, rank)
        values = torch.linalg.svdvals(turn)
        if float(values[-1]) > 1e-3 * float(values[0]):
            weighted = torch.cat(
                [u[:, :alive] * s[:alive], torch.zeros(m, rank - alive, dtype=u.dtype)], dim=1
            )
            return torch.linalg.solve(turn, weighted, left=False), turn @ basis
    root = s.sqrt()
    left, right = torch.zeros(m, rank, dtype=u.dtype), torch.zeros(rank, n, dtype=u.dtype)
    left[:, :k], right[:k] = u * root, root[:, None] * vt
    return left, right


def inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Frobenius inner product ``<L_a R_a, L_b R_b> = sum((L_a^T L_b) * (R_a R_b^T))``, in O((m + n) r**2).

    Args:
        a: left ``(m, r)`` and right ``(r, n)``.
        b: the same of another rank.
    """
    return float(((a[0].T @ b[0]) * (a[1] @ b[1].T)).sum())


def pad_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pad with zeros, or cut, to a rank: left ``(m, r)`` to ``(m, rank)``, right ``(r, n)`` to ``(rank, n)``."""
    keep = min(rank, left.shape[1])
    out_left = left.new_zeros(left.shape[0], rank)
    out_right = right.new_zeros(rank, right.shape[1])
    out_left[:, :keep], out_right[:keep] = left[:, :keep], right[:keep]
    return out_left, out_right
