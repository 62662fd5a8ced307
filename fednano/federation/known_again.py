"""A client's part in watching over what it had forgotten; see :mod:`fednano.federation.resurfacing`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch

from fednano.federation.messages import Instruction, Reply
from fednano.federation.schedules import fit_rank
from fednano.federation.worker import Worker, site_name
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.runs.tombstones import Tombstones
from fednano.training.data import ClientData

__all__ = ["known_again", "resurfaced"]


@torch.no_grad()
def known_again(edge: NanoEdge, llm: LanguageModel, data: ClientData, *, batch_size: int = 32) -> float:
    """Exact memorisation: mean over the samples of the share of answer tokens that are likeliest, without the end.

    Args:
        edge: NanoEdge with the adapters to look at.
        llm: the language model, here or on a host.
        data: the samples.
        batch_size: samples a call.
    """
    end, found = edge.edge.tokenizer.eos_token_id, []
    for start in range(0, len(data), batch_size):
        prompts, features = data.batch(range(start, min(start + batch_size, len(data))))
        batch = edge(prompts, features)
        for prompt, rows in zip(
            prompts, llm.score(batch.embeds, batch.mask, batch.labels, batch.images), strict=True
        ):
            ended = len(rows) > 1 and prompt.answer[-1:] == (end,)
            found.append(float(rows[: len(rows) - ended, 1].mean()))
    return fmean(found)


def resurfaced(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """The client's part: exact memorisation and size of each of its own forgotten sets that it still holds."""
    name, worker = site_name(node), Worker.get(instruction.config)
    worker.require_basis(instruction.basis)
    fit_rank(worker.edge, instruction.leaves)
    worker.edge.load_travelling(instruction.leaves)
    train, _ = worker.samples(node)
    metrics: dict[str, float] = {}
    for each in instruction.tombstones.sets:
        if each.site == name:
            left = {sample.id for sample in Tombstones(1, (each,)).keep(train)}
            gone = [sample for sample in train if sample.id not in left]
            if gone:
                data = ClientData(gone, worker.edge, worker.features)
                metrics[each.job] = known_again(worker.edge, worker.llm(instruction.ticket), data)
                metrics[f"{each.job}/samples"] = len(gone)
    return Reply(name, instruction.round, metrics, {})
