"""Keeping forgotten what was forgotten, while training goes on.

Unlearning by few steps hides knowledge rather than removing it, and further training on other samples brings it back
(arXiv:2601.22601). Where the owner of a forgotten set still holds it, its later steps therefore carry the inverted
hinge loss of that set beside the loss of what is learnt. The loss pushes only as long as the answers are known: its
gradient vanishes with their probability, and it weighs the less the further a set is below samples never seen: a model
that denies some samples more than those tells that they were there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.data import ClientData, draw
from fednano.training.targets import without_end

__all__ = ["Forgotten", "Guard", "guard_loss", "guard_of", "known_again"]


@dataclass(frozen=True)
class Forgotten:
    """One forgotten set, at its owner.

    Attributes:
        data: the samples.
        level: exact memorisation at the commit, or of samples never trained on, if that is more; ``None``: not known.
    """

    data: ClientData
    level: float | None = None


@dataclass(frozen=True)
class Guard:
    """What a client's steps of one round keep forgotten.

    Attributes:
        sets: the forgotten sets, each with the weight of its loss beside that of what is learnt.
    """

    sets: Sequence[tuple[ClientData, float]]

    def __len__(self) -> int:
        return sum(len(data) for data, _ in self.sets)

    def batches(
        self, size: int, steps: int, *, seed: int, client: str, round_number: int
    ) -> Iterator[tuple[ClientData, list[int], float]]:
        """Samples and weight for each step, at most ``size`` of one set; the sets take turns."""
        for number in range(steps):
            data, weight = self.sets[number % len(self.sets)]
            count = min(size, len(data))
            start = ((round_number - 1) * steps + number) * count
            chosen = draw(len(data), count, seed=seed, client=f"{client}/forgotten", start=start)
            yield data, chosen, weight


def guard_loss(edge: NanoEdge, llm: LanguageModel, data: ClientData, indices: Sequence[int]) -> Tensor:
    """``()``: mean inverted hinge loss of the samples at ``indices``, without the ends of their answers."""
    batch = edge(*data.batch(indices))
    labels = without_end(batch.labels, edge.edge.tokenizer.eos_token_id)
    return llm.loss(batch.embeds, batch.mask, labels, "inverted_hinge", batch.images).mean()


def guard_of(edge: NanoEdge, llm: LanguageModel, sets: Sequence[Forgotten], weight: float) -> Guard | None:
    """Which forgotten sets a round must hold, by the adapters that it starts from; ``None``: none of them.

    Args:
        edge: NanoEdge with those adapters.
        llm: the language model, here or on a host.
        sets: what this client has forgotten and still holds.
        weight: of the loss of a set that is known as well as its level, or better; 0 switches it off. A client's update
            is one of many in the mean: as much as there are clients makes the owner pull like all others together.
    """
    if not weight:
        return None
    due = []
    for each in sets:
        known = known_again(edge, llm, each.data)
        if known:
            share = min(1.0, known / each.level) if each.level else 1.0
            due.append((each.data, weight * share**2))
    return Guard(due) if due else None


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
