"""Distances between what adapters do, without forming what they do.

Factors are not unique, ``L R = (L M)(M^-1 R)``, so two clients may agree and still have distant factors. In
product space the distance is that of the deltas, from Gram matrices in O((m + n) r**2): ``|a - b|**2 = <a, a> -
2 <a, b> + <b, b>`` with ``<L_a R_a, L_b R_b> = sum((L_a^T L_b) * (R_a R_b^T))``; leaves outside products enter
as they are. Leaf space compares leaves, which is right for affine adapters and while all clients start from the
same factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fednano.aggregation.lowrank import inner
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Update
from fednano.errors import ConfigError

__all__ = ["check_space", "gram_matrix", "krum_scores", "lowest", "squared_distances"]


def check_space(rule: str, space: str) -> None:
    """ConfigError unless ``space`` is "product" or "leaves"."""
    if space not in ("product", "leaves"):
        raise ConfigError(f"{rule}: got space={space!r}, expected 'product' or 'leaves'")


def gram_matrix(spec: Spec, updates: Sequence[Update], space: str) -> Tensor:
    """Inner products between updates, ``(n, n)`` float64.

    Args:
        spec: which leaves form products.
        updates: n updates; in product space their ranks and scales may differ.
        space: "product" or "leaves".
    """
    n = len(updates)
    gram = torch.zeros(n, n, dtype=torch.float64)
    inside = set(spec.rank_axes()) if space == "product" else set()
    names = [name for name in updates[0].leaves if name not in inside]
    for name in names:
        flat = torch.stack([u.leaves[name].reshape(-1) for u in updates]).double()
        gram += flat @ flat.T
    if space == "product":
        for site, product in spec.products.items():
            pairs = [
                (u.leaves[product.left].double() * u.scale(site, product), u.leaves[product.right].double())
                for u in updates
            ]
            for i in range(n):
                for j in range(i + 1):
                    value = inner(pairs[i], pairs[j])
                    gram[i, j] += value
                    if i != j:
                        gram[j, i] += value
    return gram


def squared_distances(gram: Tensor) -> Tensor:
    """Squared distances ``(n, n)`` from inner products ``(n, n)``; never negative, zero on the diagonal."""
    norms = gram.diagonal()
    out = (norms[:, None] + norms[None, :] - 2.0 * gram).clamp_min(0.0)
    return out.fill_diagonal_(0.0)


def krum_scores(distances: Tensor, malicious: int) -> Tensor:
    """For each update, the sum of squared distances to its ``n - f - 2`` nearest others.

    Args:
        distances: squared, ``(n, n)``, zero diagonal.
        malicious: f.

    Returns:
        ``(n,)``.
    """
    n = distances.shape[0]
    if n == 1:
        return torch.zeros(1, dtype=distances.dtype)
    others = distances + torch.diag(torch.full((n,), math.inf, dtype=distances.dtype))
    closest = min(max(1, n - malicious - 2), n - 1)
    return others.sort(dim=1).values[:, :closest].sum(dim=1)


def lowest(scores: Tensor, count: int) -> list[int]:
    """Indices of the lowest scores; ties go to the earlier client."""
    order = sorted(range(scores.shape[0]), key=lambda i: (float(scores[i]), i))
    return sorted(order[:count])
