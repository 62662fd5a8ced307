"""Ask a model about each token of an answer, here or on a host: log-probabilities, greedy continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fednano.errors import ConfigError
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel, LocalLLM
from fednano.models.prompt import Prompt
from fednano.training.data import ClientData
from fednano.training.targets import without_end
from fednano.unlearning.metrics import TokenScores, extraction_likelihood

__all__ = ["extraction_likelihoods", "require_local", "token_scores"]


def require_local(llm: LanguageModel, what: str) -> LocalLLM:
    """The model, if it is in this process.

    Raises:
        ConfigError: it is on a host; ``what`` says what it was wanted for.
    """
    if not isinstance(llm, LocalLLM):
        raise ConfigError(
            f"{what} needs the language model's whole distribution, which a host does not give. Load the model in this "
            "process, or choose another method, such as 'loku'."
        )
    return llm


@torch.no_grad()
def token_scores(
    edge: NanoEdge, llm: LanguageModel, data: ClientData, *, batch_size: int = 32
) -> list[TokenScores]:
    """What the model says of every token of each sample's answer, its end token left out.

    Args:
        edge: NanoEdge with the adapters to use.
        llm: the language model, here or on a host.
        data: the samples.
        batch_size: samples a call.
    """
    found: list[TokenScores] = []
    for start in range(0, len(data), batch_size):
        batch = edge(*data.batch(range(start, min(start + batch_size, len(data)))))
        labels = without_end(batch.labels, edge.edge.tokenizer.eos_token_id)
        for rows in llm.score(batch.embeds, batch.mask, labels, batch.images):
            own, right, mean, deviation, rival = (column.numpy() for column in rows.unbind(1))
            found.append(TokenScores(own, right != 0, mean, deviation, rival))
    return found


@torch.no_grad()
def extraction_likelihoods(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    *,
    n: int = 10,
    samples: int = 32,
    prefixes: int = 16,
    batch_size: int = 64,
) -> list[float | None]:
    """``EL_n`` of the first ``samples`` answers: greedy continuations from prefixes of each, by the model itself.

    Args:
        edge: NanoEdge with the adapters to use.
        llm: the language model, here or on a host.
        data: the samples.
        n: length of an n-gram.
        samples: how many samples are looked at; each costs a generation for every prefix.
        prefixes: most prefixes of an answer, spread evenly; all of them where it is as short.
        batch_size: prefixes a call.

    Returns:
        One number a sample, ``None`` where the answer has fewer than ``n`` tokens.
    """
    end = edge.edge.tokenizer.eos_token_id
    answers: list[tuple[int, ...]] = []
    asked: list[_Continuation] = []
    for index in range(min(samples, len(data))):
        (prompt,), features = data.batch([index])
        answer = prompt.answer[:-1] if prompt.answer[-1:] == (end,) else prompt.answer
        answers.append(tuple(answer))
        asked += [
            _Continuation(index, start, Prompt(prompt.ids + answer[:start], ()), features)
            for start in _spread(len(answer) - n + 1, prefixes)
        ]
    said: list[dict[int, Sequence[int]]] = [{} for _ in answers]
    # Together with those that go on for about as long: a call generates as many tokens for all of its rows.
    asked.sort(key=lambda each: (each.start - len(answers[each.sample]), each.sample))
    for first in range(0, len(asked), batch_size):
        part = asked[first : first + batch_size]
        batch = edge([each.prompt for each in part], [row for each in part for row in each.features])
        longest = max(len(answers[each.sample]) - each.start for each in part)
        found = llm.generate(batch.embeds, batch.mask, longest, edge.embed_new, batch.images)
        for each, tokens in zip(part, found.tolist(), strict=True):
            said[each.sample][each.start] = tokens[: len(answers[each.sample]) - each.start]
    return [extraction_likelihood(answer, own, n=n) for answer, own in zip(answers, said, strict=True)]


@dataclass(frozen=True)
class _Continuation:
    """A prefix of an answer that is to be gone on from; ``features`` are those of its sample's image."""

    sample: int
    start: int
    prompt: Prompt
    features: Sequence[Tensor | None]


def _spread(available: int, count: int) -> list[int]:
    if available <= count:
        return list(range(max(0, available)))
    return [index * available // count for index in range(count)]
