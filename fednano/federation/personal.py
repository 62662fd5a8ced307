"""A global and a personal adapter at once, mixed for each input (FedDPA, arXiv:2403.19211).

``y = mix personal(x) + (1 - mix) global(x)``, where ``mix`` is how much a question resembles the client's own data: the
mean cosine similarity of its embedding, before any adapter, to those of a few training questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from fednano.aggregation.factors import instance_mix
from fednano.data import Sample
from fednano.models.edge import Composed, NanoEdge
from fednano.models.language import LanguageModel
from fednano.models.prompt import Prompt
from fednano.training.answers import generate_answers
from fednano.training.features import FeatureCache

__all__ = ["mixed_answers"]

_BATCH = 64


class _MixedEdge:
    """A NanoEdge, which holds the global adapter, with a personal one beside it; for one batch at a time."""

    def __init__(self, edge: NanoEdge, own: Mapping[str, Tensor], reference: Tensor, strength: float) -> None:
        self.edge = edge.edge
        self._general, self._reference, self._strength = edge, reference, strength
        self._own: dict[str, dict[str, Tensor]] = {stream: {} for stream in edge.layers}
        for name, leaf in own.items():
            stream, _, key = name.partition(".")
            self._own[stream][key] = leaf
        self._mix = torch.zeros(0)

    def __call__(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None]) -> Composed:
        batch = self._general(prompts, features)
        self._mix = instance_mix(_embedding(batch), self._reference, self._strength)  # (B,)
        embeds = batch.embeds
        for stream, where in batch.streams.items():  # (B, T)
            if stream in self._own and where.any():
                share = self._mix[:, None].expand(where.shape)[where][:, None].to(embeds)  # (N, 1)
                own = self._general.layer(stream).functional(self._own[stream], batch.raw[where])  # (N, d)
                mixed = share * own + (1 - share) * batch.embeds[where]
                embeds = embeds.masked_scatter(where.unsqueeze(-1), mixed)
        return Composed(embeds, batch.mask, batch.labels, batch.raw, batch.streams, batch.images)

    def embed_new(self, ids: Tensor) -> Tensor:
        """Generated tokens ``(B,)`` of the batch composed last, mixed as their questions are."""
        general = self._general.embed_new(ids)
        if "text" not in self._own:
            return general
        rows = self.edge.embed(ids)
        share = self._mix[:, None].to(rows)
        own = self._general.layer("text").functional(self._own["text"], rows)
        return share * own + (1 - share) * general


def mixed_answers(
    edge: NanoEdge,
    own: Mapping[str, Tensor],
    llm: LanguageModel,
    features: FeatureCache,
    samples: Sequence[Sample],
    *,
    reference: Sequence[Sample],
    strength: float,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers with the global adapter of ``edge`` and the personal leaves ``own``, mixed for each question.

    Args:
        edge: holds the global adapter.
        own: the personal adapter's leaves, named as they would travel.
        llm: the language model.
        features: encodes images.
        samples: questions.
        reference: some of the client's own training samples.
        strength: factor on the similarity to them.
        max_new_tokens: longest answer, in tokens.
    """
    with torch.no_grad():
        prompts = [
            edge.edge.prompt(s.question, None, image=s.image is not None, history=s.history)
            for s in reference
        ]
        known = _embedding(edge(prompts, features.get(reference)))
        mixed = cast("NanoEdge", _MixedEdge(edge, own, known, strength))
        answers: list[str] = []
        # One batch a call: generated tokens need the mix of their own questions.
        for start in range(0, len(samples), _BATCH):
            part = samples[start : start + _BATCH]
            answers += generate_answers(
                mixed, llm, features, part, max_new_tokens=max_new_tokens, batch_size=_BATCH
            )
    return answers


def _embedding(batch: Composed) -> Tensor:
    """Mean of each question's embeddings before the adapters, ``(B, d)``."""
    mask = batch.mask.unsqueeze(-1).to(batch.raw)
    return (batch.raw * mask).sum(dim=1) / mask.sum(dim=1)
