"""Ask the tuned model: greedy answers for samples, and how many are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fednano.data import Sample
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.features import FeatureCache

__all__ = ["generate_answers"]


@torch.no_grad()
def generate_answers(
    edge: NanoEdge,
    llm: LanguageModel,
    features: FeatureCache,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 4,
    batch_size: int = 128,
) -> list[str]:
    """Greedy answers to the samples' questions, as text, in order.

    Samples are grouped by prompt length so that batches carry little padding; the answers do not depend on it.

    Args:
        edge: NanoEdge with the adapters to use.
        llm: the language model, here or on a host.
        features: encodes the samples' images.
        samples: questions with or without an image.
        max_new_tokens: longest answer, in tokens.
        batch_size: questions a call.
    """
    prompts = [edge.edge.prompt(sample.question, None, image=sample.image is not None) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: (len(prompts[index].ids), index))
    answers = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        batch = edge([prompts[index] for index in part], features.get([samples[index] for index in part]))
        ids = llm.generate(batch.embeds, batch.mask, max_new_tokens, edge.embed_new)  # (B, max_new_tokens)
        texts = edge.edge.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for index, text in zip(part, texts, strict=True):
            answers[index] = text.strip()
    return answers
