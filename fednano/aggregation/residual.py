"""Rules whose merged adapter is its leaves plus a low-rank residual beside the frozen model: FedEx and FLoRA.

FedEx (arXiv 2410.09432) writes the residual between the mean of products and the product of means into the base
weights, FLoRA (arXiv 2409.05976) its whole stacked change. Here the model is never written: the residual is a
pair of factors that travels and is carried beside the model, ``y += x @ (left @ right)`` in the orientation of
the site's product. That is the same function.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.lowrank import Term, pad_rank, stack, truncated_svd
from fednano.aggregation.products import (
    HeldRule,
    plain_means,
    products_only,
    served,
    shares,
    sum_of,
    terms_of,
)
from fednano.aggregation.rule import Capability, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves
from fednano.errors import ConfigError

__all__ = ["FLoRA", "FedEx"]

_LINEAR = frozenset({"affine", "multilinear"})


class _Residual(HeldRule):
    """A held rule whose merged adapter is its leaves plus ``residual/<site>.left @ residual/<site>.right``."""

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`."""
        products_only(spec, self.name)
        return super().init(spec, current=current, memory=memory, round=round)

    def memory(self, state: State) -> Leaves:
        """The residual of each site: ``residual/<site>.left`` ``(m, q)`` and ``residual/<site>.right`` ``(q, n)``."""
        return dict(state.memory)

    def downlink(self, memory: Mapping[str, Tensor]) -> Leaves:
        """The residual, to be carried beside the frozen model with scale 1."""
        return dict(memory)

    @staticmethod
    def previous(state: State, site: str) -> list[Term]:
        """The residual so far, as a term."""
        left = state.memory.get(f"residual/{site}.left")
        return [] if left is None else [(1.0, left, state.memory[f"residual/{site}.right"])]

    @staticmethod
    def store(state: State, site: str, terms: Sequence[Term], cap: int) -> None:
        """Keep the sum of the terms as the new residual, without loss unless ``cap`` cuts it."""
        left, right = stack(terms)
        u, s, vt = truncated_svd(left, right, left.shape[1])
        # Rank that is only rounding noise would be paid for on every downlink.
        alive = max(int((s > 1e-13 * s[0]).sum()), 1) if float(s[0]) > 0.0 else 1
        keep = min(alive, cap) if cap else alive
        lost, whole = float(s[keep:].norm()), float(s.norm())
        state.report[f"truncation/{site}"] = lost / whole if whole > 0.0 else 0.0
        dtype = state.spec.leaves[state.spec.products[site].left].dtype
        root = s[:keep].sqrt()
        state.memory[f"residual/{site}.left"] = (u[:, :keep] * root).to(dtype)
        state.memory[f"residual/{site}.right"] = (root[:, None] * vt[:keep]).to(dtype).contiguous()


@dataclass(frozen=True)
class FedEx(_Residual):
    """Mean factors plus the exact residual, carried beside the model.

    Attributes:
        residual_rank: cut the residual to this rank; 0: keep it whole.
    """

    residual_rank: int = 0

    name: ClassVar[str] = "fedex"
    capability: ClassVar[Capability] = Capability(
        summary="mean factors, and the exact residual carried beside the frozen model",
        paper="2410.09432",
        exact=_LINEAR,
        exact_note="the mean of the deltas: mean factors plus a residual of rank up to (K + 1) r",
        allowed=_LINEAR,
        bytes_down="1 + residual (up to K + 1, less when cut)",
        streaming=False,
        secure_aggregation=False,
        ranks=True,
        needs=frozenset({"products"}),
        late=False,
    )

    def __post_init__(self) -> None:
        if self.residual_rank < 0:
            raise ConfigError(f"fedex: got residual_rank={self.residual_rank}, expected 0 (whole) or a rank")

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        spec, updates = state.spec, state.in_order()
        weights = shares(updates)
        out = plain_means(spec, updates, weights)
        for site, product in spec.products.items():
            rank = spec.rank(site)
            padded = []
            for w, u in zip(weights, updates, strict=True):
                ratio = u.scale(site, product) / product.scale
                left, right = pad_rank(
                    u.leaves[product.left].double(), u.leaves[product.right].double(), rank
                )
                padded.append(
                    (w * left, w * right * ratio) if product.down == "left" else (w * left * ratio, w * right)
                )
            mean = (sum_of([p[0] for p in padded]), sum_of([p[1] for p in padded]))
            for name, leaf in zip((product.left, product.right), mean, strict=True):
                out[name] = leaf.to(spec.leaves[name].dtype)
            kept: Term = (-product.scale, out[product.left], out[product.right])
            terms = [*terms_of(site, product, updates, weights), kept, *self.previous(state, site)]
            self.store(state, site, terms, self.residual_rank)
        return out

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


@dataclass(frozen=True)
class FLoRA(_Residual):
    """The stacked factors become the residual beside the model, and the adapter starts afresh.

    Attributes:
        residual_rank: cut the residual to this rank; 0: keep it whole (its rank grows by the sum of the
            clients' ranks each round, up to that of the site).
        seed: of the fresh down factors, drawn with the root mean square of the ones before; B starts at zero.
    """

    residual_rank: int = 0
    seed: int = 0

    name: ClassVar[str] = "flora"
    capability: ClassVar[Capability] = Capability(
        summary="stacked factors carried beside the frozen model, fresh adapters each round",
        paper="2409.05976",
        exact=_LINEAR,
        exact_note="the mean of the deltas, as one stacked product",
        allowed=_LINEAR,
        bytes_down="1 + K per round so far, up to the rank of the site",
        streaming=False,
        secure_aggregation=False,
        ranks=True,
        needs=frozenset({"products"}),
        late=False,
        codecs_refused=frozenset({"int4", "sign", "topk", "dct"}),
        codecs_note="every round starts from fresh factors, to which the error fed back does not belong",
    )

    def __post_init__(self) -> None:
        if self.residual_rank < 0:
            raise ConfigError(f"flora: got residual_rank={self.residual_rank}, expected 0 (whole) or a rank")

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`; ``current`` is needed for the size of the fresh factors."""
        state.require_updates()
        current = state.require_current(self.name)
        spec, updates = state.spec, state.in_order()
        weights = shares(updates)
        out = plain_means(spec, updates, weights)
        for index, (site, product) in enumerate(spec.products.items()):
            terms = [*terms_of(site, product, updates, weights), *self.previous(state, site)]
            self.store(state, site, terms, self.residual_rank)
            draw = torch.Generator().manual_seed((self.seed * 1_000_003 + state.round) * 10_007 + index)
            old = current[product.A].double()
            fresh = torch.randn(old.shape, generator=draw, dtype=torch.float64) * old.square().mean().sqrt()
            out[product.A] = fresh.to(spec.leaves[product.A].dtype)
            out[product.B] = torch.zeros(spec.leaves[product.B].shape, dtype=spec.leaves[product.B].dtype)
        return out

    def for_client(
        self,
        leaves: Leaves,
        spec: Spec,
        *,
        ranks: Mapping[str, int] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Leaves:
        """The first rows of the fresh down factors: B is zero, so no client's delta changes. See `Rule.for_client`."""
        out = dict(leaves)
        for site, product in spec.products.items():
            rank = (ranks or {}).get(site, spec.rank(site))
            if not 1 <= rank <= spec.rank(site):
                raise ConfigError(
                    f"rule 'flora': client rank {rank} at site {site}, expected 1 to {spec.rank(site)}"
                )
            left, right = pad_rank(leaves[product.left], leaves[product.right], rank)
            out[product.left], out[product.right] = left, right
        return out
