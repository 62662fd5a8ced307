"""Where unlearning starts: the run's adapter as it is, or rewritten by FILA."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.data import ClientData, draw
from fednano.unlearning.fila_bridge import Prepared, bridge_fisher, prepare
from fednano.unlearning.fisher import FLOOR, row_weights, row_weights_from_sums

if TYPE_CHECKING:
    from fednano.unlearning.outcome import UnlearnRequest
    from fednano.unlearning.workspace import Workspace

__all__ = [
    "APPROXIMATE",
    "EXACT",
    "Rows",
    "Start",
    "fila_start",
    "fisher_of",
    "plain_start",
    "rows_from_sums",
    "site_rows",
]


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


@dataclass(frozen=True)
class Rows:
    """FILA's row weights.

    Attributes:
        weights: stream to ``(d,)`` float64.
        how: how the Fishers were made, for the receipt.
        seconds: client-seconds spent.
    """

    weights: dict[str, Tensor]
    how: str
    seconds: float


EXACT = "exact: forget and retained Fisher at the owner"
APPROXIMATE = "approximation: ratio of row sums, the retained ones of other clients"


def plain_start(edge: NanoEdge, leaves: Mapping[str, Tensor]) -> Start:
    """The run's adapter as it is, all of it trained."""
    edge.load_travelling(leaves)
    own = edge.travelling()
    return Start(own, {n: torch.ones_like(v, dtype=torch.bool) for n, v in own.items()}, {}, None, 0.0)


def fila_start(edge: NanoEdge, leaves: Mapping[str, Tensor], rows: Rows, rank: int) -> Start:
    """The run's adapter, rewritten so that its first ``rank`` components are what the forget set leans on.

    Raises:
        ConfigError: the run's adapter is no product of two factors, which FILA needs.
    """
    began = time.perf_counter()
    edge.load_travelling(leaves)
    prepared = prepare(edge, rows.weights, rank)
    facts = {
        "fisher": rows.how,
        "fisher_floor": FLOOR,
        "ranks": prepared.ranks,
        "largest_difference": prepared.error,
    }
    seconds = rows.seconds + time.perf_counter() - began
    return Start(prepared.leaves, prepared.moving, facts, prepared, seconds)


def site_rows(
    request: UnlearnRequest, work: Workspace, forget: ClientData, retain: Mapping[str, ClientData]
) -> Rows:
    """Row weights where all sites' samples are in this process.

    The owner computes both Fishers on its own samples. An owner that keeps no samples has none of its own to compare
    with: then the others' row sums are taken, and the weights are an approximation.
    """
    work.edge.load_travelling(work.leaves)
    began, owner = time.perf_counter(), work.scope.owner
    mine = fisher_of(request.seed, request.fisher_samples, work.edge, work.llm, forget, owner, end=False)
    if owner in retain:
        theirs = fisher_of(
            request.seed, request.fisher_samples, work.edge, work.llm, retain[owner], owner, end=True
        )
        rows = {stream: row_weights(mine[stream], theirs[stream]) for stream in mine}
        return Rows(rows, EXACT, time.perf_counter() - began)
    others = []
    for name in sorted(retain):
        theirs = fisher_of(
            request.seed, request.fisher_samples, work.edge, work.llm, retain[name], name, end=True
        )
        others.append({stream: value.sum(dim=1) for stream, value in theirs.items()})
    rows = rows_from_sums({stream: value.sum(dim=1) for stream, value in mine.items()}, others)
    return Rows(rows, APPROXIMATE, time.perf_counter() - began)


def rows_from_sums(mine: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Row weights from the owner's row sums ``(d,)`` and those of others, in the order of their names."""
    rows = {}
    for stream, value in mine.items():
        total = torch.zeros(len(value)).double()
        for each in others:
            total = total + each[stream]
        rows[stream] = row_weights_from_sums(value, total)
    return rows


def fisher_of(
    seed: int, samples: int, edge: NanoEdge, llm: LanguageModel, data: ClientData, client: str, *, end: bool
) -> dict[str, Tensor]:
    """A party's Fisher of each stream's change ``(d, d)``, on at most ``samples`` that the seed draws.

    See `bridge_fisher`.
    """
    chosen = draw(len(data), min(samples, len(data)), seed=seed, client=f"{client}/fila", start=0)
    return bridge_fisher(edge, llm, data, chosen, end=end)
