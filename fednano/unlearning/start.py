"""Where unlearning starts: the run's adapter as it is, or rewritten by FILA."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fednano.training.data import ClientData, draw
from fednano.unlearning.fila_bridge import Prepared, bridge_fisher, prepare
from fednano.unlearning.fisher import FLOOR, row_weights, row_weights_from_sums
from fednano.unlearning.methods import Method

if TYPE_CHECKING:
    from fednano.unlearning.outcome import UnlearnRequest
    from fednano.unlearning.workspace import Workspace

__all__ = ["Start", "make_start"]


@dataclass(frozen=True)
class Start:
    """The first shadow adapter.

    Attributes:
        leaves: what the first round sends; it computes what the run's adapter computes.
        moving: leaf to boolean tensor: what is trained.
        facts: for the receipt: how the Fishers were made, ranks, error.
        prepared: FILA's rewriting, where the method has it.
        seconds: client-seconds spent.
    """

    leaves: dict[str, Tensor]
    moving: dict[str, Tensor]
    facts: dict[str, Any]
    prepared: Prepared | None
    seconds: float


def make_start(
    request: UnlearnRequest,
    method: Method,
    work: Workspace,
    forget: ClientData,
    retain: Mapping[str, ClientData],
) -> Start:
    """Prepare the shadow adapter.

    The owner computes both Fishers on its own samples, and only the row weights leave it. An owner that keeps no
    samples has none of its own to compare with: then the others send row sums, and the weights are an approximation.

    Raises:
        ConfigError: the run's adapter is no product of two factors, which FILA needs.
    """
    work.edge.load_travelling(work.leaves)
    if not method.fila:
        leaves = work.edge.travelling()
        return Start(
            leaves, {n: torch.ones_like(v, dtype=torch.bool) for n, v in leaves.items()}, {}, None, 0.0
        )
    began = time.perf_counter()
    owner = work.scope.owner
    mine = _fisher(request, work, forget, owner, end=False)
    if owner in retain:
        theirs = _fisher(request, work, retain[owner], owner, end=True)
        rows = {stream: row_weights(mine[stream], theirs[stream]) for stream in mine}
        how = "exact: forget and retained Fisher at the owner"
    else:
        sums: dict[str, Tensor] = {}
        for name in sorted(retain):
            for stream, value in _fisher(request, work, retain[name], name, end=True).items():
                sums[stream] = sums.get(stream, torch.zeros(len(value)).double()) + value.sum(dim=1)
        rows = {stream: row_weights_from_sums(mine[stream].sum(dim=1), sums[stream]) for stream in mine}
        how = "approximation: ratio of row sums, the retained ones of other clients"
    prepared = prepare(work.edge, rows, request.rank)
    facts = {
        "fisher": how,
        "fisher_floor": FLOOR,
        "ranks": prepared.ranks,
        "largest_difference": prepared.error,
    }
    return Start(prepared.leaves, prepared.moving, facts, prepared, time.perf_counter() - began)


def _fisher(
    request: UnlearnRequest, work: Workspace, data: ClientData, client: str, *, end: bool
) -> dict[str, Tensor]:
    count = min(request.fisher_samples, len(data))
    chosen = draw(len(data), count, seed=request.seed, client=f"{client}/fila", start=0)
    return bridge_fisher(work.edge, work.llm, data, chosen, end=end)
