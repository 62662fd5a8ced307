"""Memorisation of one sample's answer, from what a model says of each of its tokens.

With ``p_t`` the probability of answer token ``t`` of ``T`` given all tokens before it:

=========================  ==============================================================================
probability                ``exp(mean_t log p_t)`` (TOFU, arXiv 2401.06121)
exact memorisation         share of tokens that are the likeliest (Tirumala et al., arXiv 2205.10770)
memorisation accuracy, MA  the same share over a sequence (Jang et al., arXiv 2210.01504)
extraction strength        ``1 - k/T``, ``k`` the shortest prefix after which every token is the likeliest
                           (Carlini et al., arXiv 2012.07805)
extraction likelihood      n-grams of the greedy continuation of every prefix that stand in what really follows
=========================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fednano.errors import DataError

__all__ = [
    "TokenScores",
    "exact_memorisation",
    "extraction_likelihood",
    "extraction_strength",
    "inverted_hinge_score",
    "memorisation_accuracy",
    "probability",
]


@dataclass(frozen=True)
class TokenScores:
    """What a model says of the ``T >= 1`` tokens of one answer, the end token left out.

    Attributes:
        log_probs: ``(T,)`` log-probability of each token, in nats.
        correct: ``(T,)`` whether it is the likeliest token.
        mean: ``(T,)`` expectation of the log-probability under the model's own distribution.
        deviation: ``(T,)`` its standard deviation.
        rival: ``(T,)`` log-probability of the likeliest other token.
    """

    log_probs: NDArray[np.float64]
    correct: NDArray[np.bool_]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]
    rival: NDArray[np.float64]

    def __post_init__(self) -> None:
        arrays = (self.log_probs, self.correct, self.mean, self.deviation, self.rival)
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1 or self.log_probs.ndim != 1 or not self.log_probs.size:
            raise DataError(
                f"token scores have the shapes {sorted(shapes)}; expected five arrays (T,) with T >= 1."
            )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats a token."""
        return float(-self.log_probs.mean())


def probability(scores: TokenScores) -> float:
    """Geometric mean of the tokens' probabilities, in ``[0, 1]``."""
    return float(np.exp(-scores.loss))


def inverted_hinge_score(scores: TokenScores) -> float:
    """Mean inverted hinge ``1 + p_t - max_{v != t} p_v`` of the tokens, in ``[0, 2]``: what LoKU minimises."""
    return float((1 + np.exp(scores.log_probs) - np.exp(scores.rival)).mean())


def exact_memorisation(scores: TokenScores) -> float:
    """Share of answer tokens that are the likeliest given the true ones before them, in ``[0, 1]``."""
    return float(scores.correct.mean())


def memorisation_accuracy(scores: TokenScores) -> float:
    """Jang et al.'s MA, in ``[0, 1]``.

    There the first token of a bare sequence has nothing before it and does not count; here a prompt stands before the
    answer, every token counts, and MA equals the exact memorisation.
    """
    return exact_memorisation(scores)


def extraction_strength(correct: Sequence[bool] | NDArray[np.bool_]) -> float:
    """Share of the answer that follows by itself once its beginning is given, in ``[0, 1]``.

    0 where even the last token is not the likeliest. (A published version gives ``1/T`` there.)

    Args:
        correct: ``(T,)``, ``T >= 1``: whether each token is the likeliest.

    Raises:
        DataError: there is no token.
    """
    flags = np.asarray(correct, dtype=bool)
    if flags.ndim != 1 or not flags.size:
        raise DataError(f"extraction strength got shape {flags.shape}; expected (T,) with T >= 1.")
    wrong = np.flatnonzero(~flags)
    return 1.0 if not wrong.size else float(flags.size - 1 - wrong[-1]) / flags.size


def extraction_likelihood(
    answer: Sequence[int], continuations: Mapping[int, Sequence[int]], *, n: int = 10
) -> float | None:
    """Extraction likelihood ``EL_n`` (Jang et al., arXiv 2210.01504, equation 2), in ``[0, 1]``.

    For each prefix length ``t`` with at least one n-gram left: how many n-grams of the continuation, counted as often
    as they occur, are among those of ``answer[t:]``, over the number of the latter; the mean over ``t``.

    Args:
        answer: ``T`` token ids.
        continuations: prefix length ``t`` to the model's greedy continuation of ``answer[:t]`` (after its prompt);
            tokens beyond ``T - t`` are not looked at.
        n: length of an n-gram.

    Returns:
        ``None`` where the answer has fewer than ``n`` tokens, or no continuation was given: not defined.
    """
    terms = []
    for start, said in continuations.items():
        truth = _ngrams(answer[start:], n)
        if truth:
            known = set(truth)
            hits = sum(gram in known for gram in _ngrams(said[: len(answer) - start], n))
            terms.append(hits / len(truth))
    return float(np.mean(terms)) if terms else None


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
