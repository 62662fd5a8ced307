"""Ask a model about each token of an answer, here or on a host: log-probabilities, greedy continuations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fednano.errors import ConfigError
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel, LocalLLM
from fednano.models.prompt import Prompt
from fednano.training.data import ClientData
from fednano.unlearning.metrics import TokenScores, extraction_likelihood
from fednano.unlearning.targets import without_end

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
        for rows in llm.score(batch.embeds, batch.mask, labels):
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
    result: list[float | None] = []
    for index in range(min(samples, len(data))):
        (prompt,), features = data.batch([index])
        answer = prompt.answer[:-1] if prompt.answer[-1:] == (end,) else prompt.answer
        starts = _spread(len(answer) - n + 1, prefixes)
        said: dict[int, Sequence[int]] = {}
        for first in range(0, len(starts), batch_size):
            part = starts[first : first + batch_size]
            batch = edge(
                [Prompt(prompt.ids + answer[:start], ()) for start in part], list(features) * len(part)
            )
            tokens = llm.generate(batch.embeds, batch.mask, len(answer) - part[0], edge.embed_new)
            said.update(zip(part, tokens.tolist(), strict=True))
        result.append(extraction_likelihood(answer, said, n=n))
    return result


def _spread(available: int, count: int) -> list[int]:
    if available <= count:
        return list(range(max(0, available)))
    return [index * available // count for index in range(count)]
