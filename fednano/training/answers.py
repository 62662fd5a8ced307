"""Ask the tuned model: greedy answers for samples, and the losses of the right ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fednano.data import Sample
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.models.prompt import Prompt
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.overlap import overlap

__all__ = ["answer_losses", "generate_answers", "longest_answer"]


no_grad = torch.no_grad()  # as a decorator: what a thread inherits of the caller's setting is nothing


def generate_answers(
    edge: NanoEdge,
    llm: LanguageModel,
    features: FeatureCache,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 4,
    batch_size: int = 64,
    width: int = 1,
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
        width: calls at one time.
    """
    prompts = [_prompt(edge, sample, None) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: (len(prompts[index].ids), index))
    features.warm(samples)
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def task(part: list[int]) -> Callable[[], Tensor]:
        with torch.no_grad():
            batch = edge([prompts[index] for index in part], features.get([samples[index] for index in part]))
        return no_grad(
            lambda: llm.generate(batch.embeds, batch.mask, max_new_tokens, edge.embed_new, batch.images)
        )

    answers = [""] * len(samples)
    for part, ids in zip(parts, overlap(map(task, parts), width), strict=True):  # ids (B, max_new_tokens)
        texts = edge.edge.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for index, text in zip(part, texts, strict=True):
            answers[index] = text.strip()
    return answers


def longest_answer(edge: NanoEdge, samples: Sequence[Sample], *, least: int = 3, most: int = 256) -> int:
    """Tokens that the longest right answer takes, its end token included, in ``[least, most]``."""
    found = least
    for sample in samples:
        prompt = _prompt(edge, sample, sample.answer)
        found = max(found, len(prompt.answer))
        if found >= most:
            return most
    return found


def _prompt(edge: NanoEdge, sample: Sample, answer: str | None) -> Prompt:
    return edge.edge.prompt(sample.question, answer, image=sample.image is not None, history=sample.history)


def answer_losses(
    edge: NanoEdge, llm: LanguageModel, data: ClientData, *, batch_size: int = 32, width: int = 1
) -> Tensor:
    """Mean loss of each sample's answer, in nats a token.

    Args:
        edge: NanoEdge with the adapters to use.
        llm: the language model, here or on a host.
        data: N samples with answers.
        batch_size: samples a call.
        width: calls at one time.

    Returns:
        ``(N,)`` float32 on the CPU.
    """

    def task(start: int) -> Callable[[], Tensor]:
        with torch.no_grad():
            batch = edge(*data.batch(range(start, min(start + batch_size, len(data)))))
        return no_grad(lambda: llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).cpu())

    return torch.cat(list(overlap(map(task, range(0, len(data), batch_size)), width)))
