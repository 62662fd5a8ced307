"""What every update of a run must look like, read off the adapters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fednano.adapters import LoRA, NanoAdapter
from fednano.aggregation import LeafSpec, Product, Spec
from fednano.federation.config import RunConfig
from fednano.federation.schedules import fit_rank
from fednano.models.edge import NanoEdge

__all__ = ["algebra_of", "spec_of"]


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
        max_weight=float(max(65536, config.samples * config.clients)),
    )
