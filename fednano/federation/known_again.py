"""A client's part in watching over what it had forgotten; see :mod:`fednano.federation.resurfacing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fednano.federation.messages import Instruction, Reply
from fednano.federation.schedules import fit_rank
from fednano.federation.worker import Worker, site_name
from fednano.runs.tombstones import Tombstones
from fednano.training.data import ClientData
from fednano.training.guard import Forgotten, known_again

__all__ = ["held_forgotten", "resurfaced"]


def held_forgotten(worker: Worker, instruction: Instruction, node: Mapping[str, Any]) -> dict[str, Forgotten]:
    """Job to the forgotten set of this client, of those of which it still holds samples."""
    own = instruction.tombstones.for_site(site_name(node)).sets
    if not own:
        return {}
    train, _ = worker.samples(node)
    found = {}
    for each in own:
        left = {sample.id for sample in Tombstones(1, (each,)).keep(train)}
        gone = [sample for sample in train if sample.id not in left]
        if gone:
            found[each.job] = Forgotten(ClientData(gone, worker.edge, worker.features), each.level)
    return found


def resurfaced(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """The client's part: exact memorisation and size of each of its own forgotten sets that it still holds."""
    name, worker = site_name(node), Worker.get(instruction.config)
    worker.require_basis(instruction.basis)
    fit_rank(worker.edge, instruction.leaves)
    worker.edge.load_travelling(instruction.leaves)
    metrics: dict[str, float] = {}
    for job, each in held_forgotten(worker, instruction, node).items():
        metrics[job] = known_again(worker.edge, worker.llm(instruction.ticket), each.data)
        metrics[f"{job}/samples"] = len(each.data)
    return Reply(name, instruction.round, metrics, {})
