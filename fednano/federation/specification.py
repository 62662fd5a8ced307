"""What every update of a run must look like, read off the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from fednano.adapters import LoRA, NanoAdapter
from fednano.aggregation import LeafSpec, Product, Spec
from fednano.federation.config import RunConfig
from fednano.federation.schedules import fit_rank
from fednano.models.edge import NanoEdge

__all__ = ["algebra_of", "fingerprints", "ranks_of", "spec_of"]


def algebra_of(edge: NanoEdge) -> str:
    """The algebra of the adapters: what a merge rule may assume of them."""
    return edge.layer(next(iter(edge.layers))).adapter.algebra.value


def spec_of(edge: NanoEdge, config: RunConfig, leaves: Mapping[str, Tensor] | None = None) -> Spec:
    """What every update of this run must look like.

    Args:
        edge: with the run's adapters.
        config: the run's settings.
        leaves: adapters of another rank that ``edge`` is to take on first, see `fit_rank`.
    """
    if leaves is not None:
        fit_rank(edge, leaves)
    shapes = {name: LeafSpec(tuple(leaf.shape), leaf.dtype) for name, leaf in edge.travelling().items()}
    products = {}
    for stream in edge.layers:
        adapter = edge.layer(stream).adapter
        a, b = f"{stream}.A", f"{stream}.B"
        if {a, b} <= set(shapes) and isinstance(adapter, NanoAdapter):
            products[stream] = Product(left=a, right=b, scale=adapter.scale, down="left")
        elif {a, b} <= set(shapes) and isinstance(adapter, LoRA):
            products[stream] = Product(left=b, right=a, scale=adapter.scale, down="right")
    return Spec(
        leaves=shapes,
        algebra=algebra_of(edge),
        products=products,
        spec=edge.spec(),
        basis=edge.basis_fingerprint(),
        max_clients=max(2048, config.clients),
        max_abs=config.max_abs,
        max_norm=config.max_norm or None,
        rank_limit=config.rank if config.own_ranks else None,
        max_weight=float(max(65536, config.samples * config.clients)),
    )


def ranks_of(config: RunConfig, spec: Spec, clients: Iterable[str]) -> dict[str, dict[str, int]]:
    """Client name to the rank of each site, where clients have their own: the settings' ranks in turn, by name."""
    own = config.own_ranks
    if not own:
        return {}
    return {name: dict.fromkeys(spec.products, own[i % len(own)]) for i, name in enumerate(sorted(clients))}


def fingerprints(edge: NanoEdge, leaves: Mapping[str, Tensor]) -> tuple[str, str]:
    """Fingerprints of configuration and basis that an update with the ranks of ``leaves`` must carry.

    Args:
        edge: takes on these ranks, see `fit_rank`.
        leaves: of any values.
    """
    fit_rank(edge, leaves)
    return edge.spec(), edge.basis_fingerprint()
