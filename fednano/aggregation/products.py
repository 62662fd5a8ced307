"""Rules that merge products: the weighted mean of ``s_k L_k R_k``, exactly, for clients of any rank and scale.

FlexLoRA (arXiv 2402.11505) and HLoRA (arXiv 2503.00813) take the SVD of the mean, cut it to the global rank,
and give every client the best approximation of its own rank. Here also in the client's own scale.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fednano.aggregation.lowrank import Term, factor, stack, truncated_svd
from fednano.aggregation.rule import Capability, Rule, State
from fednano.aggregation.spec import Product, Spec
from fednano.aggregation.update import Leaves, Update
from fednano.errors import ConfigError

__all__ = [
    "HeldRule",
    "ProductMean",
    "merged_products",
    "plain_means",
    "products_only",
    "served",
    "shares",
    "sum_of",
    "terms_of",
]

_LINEAR = frozenset({"affine", "multilinear"})


class HeldRule(Rule):
    """A rule that must see all updates: it keeps them and works on them in the order of client names."""

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        state.held.append(update)
        state.count(update)
        return state


def shares(updates: Sequence[Update]) -> list[float]:
    """Weights that sum to one."""
    total = math.fsum(u.weight for u in updates)
    return [u.weight / total for u in updates]


def products_only(spec: Spec, rule: str) -> None:
    """ConfigError for an adapter without products."""
    if not spec.products:
        raise ConfigError(f"rule {rule!r} merges products of two leaves, and this adapter's leaves form none")


def plain_means(spec: Spec, updates: Sequence[Update], weights: Sequence[float]) -> Leaves:
    """Weighted means of the leaves that belong to no product."""
    inside = set(spec.rank_axes())
    return {
        name: sum_of([w * u.leaves[name].double() for w, u in zip(weights, updates, strict=True)]).to(
            leaf.dtype
        )
        for name, leaf in spec.leaves.items()
        if name not in inside
    }


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of at least one tensor, left to right."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def terms_of(site: str, product: Product, updates: Sequence[Update], weights: Sequence[float]) -> list[Term]:
    """``(w_k s_k, L_k, R_k)`` of one site."""
    return [
        (w * u.scale(site, product), u.leaves[product.left], u.leaves[product.right])
        for w, u in zip(weights, updates, strict=True)
    ]


def split_svd(
    product: Product, svd: tuple[Tensor, Tensor, Tensor], rank: int, scale: float, follow: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factors of rank ``rank`` with ``scale * left @ right`` equal to the SVD's product.

    Args:
        product: which side is the down factor.
        svd: U, S, Vt of the delta, at most ``rank`` triplets.
        rank: of the factors.
        scale: of the receiver.
        follow: the down factor to stay near to, in its own orientation, or None.
    """
    u, s, vt = svd
    if product.down == "left":
        up, down = factor(vt.T, s, u.T, rank, None if follow is None else follow.T)
        return down.T, up.T / scale
    left, right = factor(u, s, vt, rank, follow)
    return left / scale, right


def merged_products(
    spec: Spec,
    updates: Sequence[Update],
    weights: Sequence[float],
    current: Leaves | None = None,
    gauge: str = "follow",
) -> tuple[Leaves, dict[str, float]]:
    """The weighted mean of the deltas, cut to the global rank, in the global scale.

    Args:
        spec: of the global adapter.
        updates: in a fixed order; ranks and scales may differ.
        weights: summing to one.
        current: the leaves the clients started from; a fallback for what the down factor should stay near to.
        gauge: "follow" keeps the down factor near the mean of the clients' own; "even" splits the singular values.

    Returns:
        All leaves, and per site ``truncation/<site>``: the norm of what the cut lost, relative to the mean.
    """
    out, report = plain_means(spec, updates, weights), {}
    for site, product in spec.products.items():
        rank = spec.rank(site)
        left, right = stack(terms_of(site, product, updates, weights))
        full = min(left.shape[1], left.shape[0], right.shape[1])
        u, s, vt = truncated_svd(left, right, rank)
        if full > rank:
            whole = max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)
            lost = max(whole - float((s * s).sum()), 0.0)
            report[f"truncation/{site}"] = math.sqrt(lost / whole) if whole > 0.0 else 0.0
        else:
            report[f"truncation/{site}"] = 0.0
        follow = _reference(spec, site, product, updates, weights, current) if gauge == "follow" else None
        pair = split_svd(product, (u, s, vt), rank, product.scale, follow)
        for name, leaf in zip((product.left, product.right), pair, strict=True):
            out[name] = leaf.to(spec.leaves[name].dtype).contiguous()
    return out, report


def _reference(
    spec: Spec,
    site: str,
    product: Product,
    updates: Sequence[Update],
    weights: Sequence[float],
    current: Leaves | None,
) -> Tensor | None:
    """The mean down factor of the clients that have the global rank, else the current one."""
    name = product.left if product.down == "left" else product.right
    shape = spec.leaves[name].shape
    pairs = [(w, u.leaves[name]) for w, u in zip(weights, updates, strict=True)]
    same = [(w, leaf) for w, leaf in pairs if tuple(leaf.shape) == shape]
    if same:
        return sum_of([w * leaf.double() for w, leaf in same]) / math.fsum(w for w, _ in same)
    return None if current is None else current[name].double()


def served(
    leaves: Leaves, spec: Spec, ranks: Mapping[str, int] | None, scales: Mapping[str, float] | None, rule: str
) -> Leaves:
    """Every product in a client's rank (the best approximation of that rank) and scale."""
    out = dict(leaves)
    for site, product in spec.products.items():
        rank = (ranks or {}).get(site, spec.rank(site))
        scale = (scales or {}).get(site, product.scale)
        if not 1 <= rank <= spec.rank(site):
            raise ConfigError(
                f"rule {rule!r}: client rank {rank} at site {site}, expected 1 to the global rank {spec.rank(site)}; "
                "give the server the largest rank of all clients"
            )
        if rank == spec.rank(site) and scale == product.scale:
            continue
        left, right = leaves[product.left].double() * product.scale, leaves[product.right].double()
        down = left / product.scale if product.down == "left" else right
        # Along the first ranks of the global factor: where the product has less rank than asked for, such as none at
        # all before the first round, two factors of zeros would never learn.
        follow = down[:, :rank] if product.down == "left" else down[:rank]
        pair = split_svd(product, truncated_svd(left, right, rank), rank, scale, follow)
        for name, leaf in zip((product.left, product.right), pair, strict=True):
            out[name] = leaf.to(spec.leaves[name].dtype).contiguous()
    return out


@dataclass(frozen=True)
class ProductMean(HeldRule):
    """Mean of the deltas by QR and SVD, cut to the global rank; each client gets its own rank and scale back.

    Attributes:
        gauge: how the mean is split into factors. "follow": the down factor stays near the mean of the clients'
            own; "even": each factor takes the roots of the singular values.
    """

    gauge: str = "follow"

    name: ClassVar[str] = "flexlora"
    capability: ClassVar[Capability] = Capability(
        summary="mean of the deltas by QR and SVD (FlexLoRA, HLoRA)",
        paper="2402.11505",
        exact=_LINEAR,
        exact_note="the mean of the deltas, then its best approximation of the global rank",
        allowed=_LINEAR,
        streaming=False,
        secure_aggregation=False,
        ranks=True,
        needs=frozenset({"products"}),
    )

    def __post_init__(self) -> None:
        if self.gauge not in ("follow", "even"):
            raise ConfigError(f"flexlora: got gauge={self.gauge!r}, expected 'follow' or 'even'")

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`."""
        products_only(spec, self.name)
        return super().init(spec, current=current, memory=memory, round=round)

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        updates = state.in_order()
        merged, state.report = merged_products(
            state.spec, updates, shares(updates), state.current, self.gauge
        )
        return merged

    def for_client(
        self,
        leaves: Leaves,
        spec: Spec,
        *,
        ranks: Mapping[str, int] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Leaves:
        """Each product's best approximation of the client's rank, in its scale. See `Rule.for_client`."""
        return served(leaves, spec, ranks, scales, self.name)
