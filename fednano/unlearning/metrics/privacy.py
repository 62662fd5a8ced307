"""Membership inference: can it be told from the model that a sample was trained on?

Each score is higher for what looks less like a member, so the attack's AUC is the probability that a sample the model
never saw scores above one it was to forget: 1 while the forget set is still memorised, 0.5 when it cannot be told
apart, below 0.5 when it was forgotten so hard that it sticks out.

=========  ===============================================================================
loss       mean loss ``l`` (Yeom et al., arXiv 1709.01604)
zlib       ``l`` over the bytes of the compressed text (Carlini et al., arXiv 2012.07805)
min_k      minus the mean of the lowest ``K`` of the log-probabilities (arXiv 2310.16789)
min_k_pp   the same of ``(log p - mu) / sigma`` (Min-K%++, arXiv 2404.02936)
reference  ``l`` minus that of a model which never saw the sample (arXiv 2012.07805)
=========  ===============================================================================
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fednano.errors import ConfigError, DataError
from fednano.unlearning.metrics.memorisation import TokenScores

__all__ = [
    "MIN_K",
    "Auc",
    "attack_auc",
    "auc",
    "loss_score",
    "min_k_plus_plus_score",
    "min_k_score",
    "priv_leak",
    "reference_score",
    "zlib_score",
]

MIN_K = 0.4
"""Share of the tokens that Min-K looks at, as in TOFU's and MUSE's evaluations."""

_LEAST_DEVIATION = 1e-3


def loss_score(scores: TokenScores) -> float:
    """Mean loss, in nats a token."""
    return scores.loss


def zlib_score(scores: TokenScores, text: str) -> float:
    """Mean loss over the length in bytes of the text, compressed by zlib.

    Args:
        scores: of the text's tokens.
        text: the answer.
    """
    return scores.loss / len(zlib.compress(text.encode()))


def min_k_score(scores: TokenScores, k: float = MIN_K) -> float:
    """Minus the mean of the lowest ``k`` of the tokens' log-probabilities; at least one token counts.

    Raises:
        ConfigError: ``k`` is not in ``(0, 1]``.
    """
    return -_lowest(scores.log_probs, k)


def min_k_plus_plus_score(scores: TokenScores, k: float = MIN_K) -> float:
    """As `min_k_score`, of log-probabilities standardised by the model's own distribution at each place.

    Raises:
        ConfigError: ``k`` is not in ``(0, 1]``.
    """
    # A distribution on one single token has no deviation: the floor keeps that finite (variance 1e-6, as published).
    return -_lowest((scores.log_probs - scores.mean) / np.maximum(scores.deviation, _LEAST_DEVIATION), k)


def reference_score(scores: TokenScores, reference: TokenScores) -> float:
    """Mean loss minus that of a reference model on the same tokens."""
    return scores.loss - reference.loss


def _lowest(values: NDArray[np.float64], k: float) -> float:
    if not 0 < k <= 1:
        raise ConfigError(f"Min-K looks at a share of the tokens; got {k}, expected a number in (0, 1].")
    count = max(1, int(len(values) * k))
    return float(np.sort(values)[:count].mean())


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Area under the ROC curve of telling ``others`` (positive) from ``members`` by the score; ties count half.

    Args:
        members: ``(m,)`` scores of samples to be forgotten, ``m >= 1``.
        others: ``(n,)`` scores of samples never seen, ``n >= 1``.

    Raises:
        DataError: one of them is empty or holds a number that is not finite.
    """
    return float(_comparisons(members, others).mean())


@dataclass(frozen=True)
class Auc:
    """An AUC with its confidence interval.

    Attributes:
        value: the AUC.
        low: lower end of the interval.
        high: upper end.
        confidence: of the interval, such as 0.95.
        members: number of samples to be forgotten.
        others: number of samples never seen.
    """

    value: float
    low: float
    high: float
    confidence: float
    members: int
    others: int


def attack_auc(
    members: Sequence[float],
    others: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Auc:
    """`auc` with a percentile bootstrap interval: both groups are drawn again with replacement, each of its own size.

    Args:
        members: see `auc`.
        others: see `auc`.
        confidence: in ``(0, 1)``.
        resamples: number of draws.
        seed: fixes them.

    Raises:
        DataError: see `auc`.
        ConfigError: ``confidence`` or ``resamples`` is out of range.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ConfigError(
            f"got confidence {confidence} and {resamples} resamples; expected a number in (0, 1) and at least 1."
        )
    table = _comparisons(members, others)  # (m, n)
    rows, columns = table.shape
    random = np.random.Generator(np.random.Philox(seed))
    # A resample is how often each sample was drawn; so a thousand of them are two matrix products.
    left = random.multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # (R, m)
    right = random.multinomial(columns, np.full(columns, 1 / columns), size=resamples)  # (R, n)
    drawn = ((left @ table) * right).sum(axis=1) / (rows * columns)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Auc(float(table.mean()), float(low), float(high), confidence, rows, columns)


def _comparisons(members: Sequence[float], others: Sequence[float]) -> NDArray[np.float64]:
    left, right = np.asarray(members, dtype=float), np.asarray(others, dtype=float)
    if not left.size or not right.size or not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise DataError(
            f"an AUC needs finite scores of both groups; got {left.size} members and {right.size} others. "
            "Name at least one sample that was never trained on."
        )
    table: NDArray[np.float64] = (right > left[:, None]) + 0.5 * (right == left[:, None])
    return table


def priv_leak(unlearned: float, reference: float = 0.5) -> float:
    """PrivLeak in percent (MUSE, arXiv 2407.06460): 0 is ideal, below is forgotten too little, above too much.

    ``((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref) * 100``, as published, of the Min-K attack.

    Args:
        unlearned: AUC after unlearning.
        reference: AUC of a model retrained without the samples; 0.5, its expectation, where there is none.

    Raises:
        DataError: an AUC is no number in ``[0, 1]``, or the reference's is 1, for which the ratio does not exist.
    """
    for value in (unlearned, reference):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise DataError(f"PrivLeak compares two AUCs; got {value}, expected a number in [0, 1].")
    if reference == 1:
        raise DataError(
            "PrivLeak does not exist for a reference AUC of 1: the groups differ even for a model that saw neither. "
            "Compare with samples of the same kind."
        )
    return ((1 - unlearned) - (1 - reference)) / (1 - reference) * 100
