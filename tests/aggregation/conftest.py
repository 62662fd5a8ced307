"""Small adapters, clients and dense deltas for the tests of merging."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fednano.aggregation import LeafSpec, Product, Spec, Update

MakeSpec = Callable[..., Spec]
MakeUpdates = Callable[..., list[Update]]


def nano_spec(d: int = 12, rank: int = 4, dtype: torch.dtype = torch.float64, **bounds: object) -> Spec:
    """Two NanoAdapter sites: ``x A B``, so A is on the left."""
    leaves = {}
    products = {}
    for site in ("image", "text"):
        leaves[f"{site}.A"] = LeafSpec((d, rank), dtype)
        leaves[f"{site}.B"] = LeafSpec((rank, d), dtype)
        products[site] = Product(f"{site}.A", f"{site}.B", scale=1.0)
    options: dict[str, object] = {
        "spec": "s",
        "basis": "b",
        "max_clients": 64,
        "max_weight": 1024.0,
        **bounds,
    }
    return Spec(leaves=leaves, products=products, **options)  # type: ignore[arg-type]


def random_updates(
    spec: Spec, clients: int = 5, seed: int = 0, fisher: bool = False, weights: list[float] | None = None
) -> list[Update]:
    """Independent updates; client names do not sort in the order of the list."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for k in range(clients):
        leaves = {
            n: torch.randn(s.shape, generator=g, dtype=torch.float64).to(s.dtype)
            for n, s in spec.leaves.items()
        }
        info = {
            n: torch.rand(s.shape, generator=g, dtype=torch.float64).to(s.dtype) ** 4
            for n, s in spec.leaves.items()
        }
        weight = weights[k] if weights else 10.0 + 7.3 * k
        out.append(
            Update(
                client=f"c{(k * 7) % 10}-{k}",
                round=3,
                weight=weight,
                leaves=leaves,
                fisher=info if fisher else None,
                spec=spec.spec,
                basis=spec.basis,
                metrics={"loss": 0.5 + 0.3 * k, "steps": 10.0, "lr": 0.1},
            )
        )
    return out


@pytest.fixture
def make_spec() -> MakeSpec:
    return nano_spec


@pytest.fixture
def make_updates() -> MakeUpdates:
    return random_updates
