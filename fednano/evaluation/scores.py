"""Judging many answers, and many clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fednano.errors import DataError
from fednano.evaluation.answers import exact_match, token_f1, vqa_accuracy

__all__ = ["ClientSpread", "LabelScore", "Scores", "across_clients", "score"]


@dataclass(frozen=True)
class LabelScore:
    """Exact matches among the samples with one right answer.

    Attributes:
        correct: number of exact matches.
        samples: number of samples, at least 1.
    """

    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        """Share of exact matches, in [0, 1]."""
        return self.correct / self.samples


@dataclass(frozen=True)
class Scores:
    """Scores over a list of samples.

    Attributes:
        samples: how many.
        accuracy: share of exact matches, in [0, 1].
        token_f1: mean token F1, in [0, 1].
        vqa: mean VQA accuracy, in [0, 1].
        per_label: right answer -> its score, sorted by answer.
    """

    samples: int
    accuracy: float
    token_f1: float
    vqa: float
    per_label: Mapping[str, LabelScore]

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the labels' accuracies: every label counts the same, however many samples it has."""
        return math.fsum(label.accuracy for label in self.per_label.values()) / len(self.per_label)


def score(
    predictions: Sequence[str], answers: Sequence[str], all_answers: Sequence[Sequence[str]] | None = None
) -> Scores:
    """Score predictions.

    Args:
        predictions: what the model said, ``(n,)``, ``n >= 1``.
        answers: the right answers, ``(n,)``.
        all_answers: where the data set has several answers a sample: all of them, ``(n,)`` lists; an empty list
            means the right answer alone.

    Raises:
        DataError: the lengths differ, or there is nothing to score.
    """
    several = all_answers if all_answers is not None else [()] * len(answers)
    if not len(predictions) == len(answers) == len(several) or not predictions:
        raise DataError(
            f"Scoring needs as many predictions as answers, at least one; got {len(predictions)} predictions, "
            f"{len(answers)} answers and {len(several)} answer lists."
        )
    hits: dict[str, list[bool]] = {}
    for said, right in zip(predictions, answers, strict=True):
        hits.setdefault(right, []).append(exact_match(said, right))
    count = len(predictions)
    f1 = math.fsum(token_f1(said, right) for said, right in zip(predictions, answers, strict=True))
    vqa = math.fsum(
        vqa_accuracy(said, given or (right,))
        for said, right, given in zip(predictions, answers, several, strict=True)
    )
    return Scores(
        samples=count,
        accuracy=sum(sum(hit) for hit in hits.values()) / count,
        token_f1=f1 / count,
        vqa=vqa / count,
        per_label={label: LabelScore(sum(hit), len(hit)) for label, hit in sorted(hits.items())},
    )


@dataclass(frozen=True)
class ClientSpread:
    """One number of every client, seen together.

    Attributes:
        mean: weighted mean.
        plain_mean: mean in which every client counts the same.
        deviation: standard deviation over clients around ``plain_mean`` (divided by their number, not by one
            less: the clients are all there are).
        low: smallest value.
        high: largest value.
        worst_client: the client with the worst value; of several, the first by name.
        clients: number of clients.
    """

    mean: float
    plain_mean: float
    deviation: float
    low: float
    high: float
    worst_client: str
    clients: int


def across_clients(
    values: Mapping[str, float],
    weights: Mapping[str, float] | None = None,
    *,
    higher_is_better: bool = True,
) -> ClientSpread:
    """Sum up one number per client. The order of the mappings does not change a bit of the result.

    Args:
        values: client -> value (an accuracy, a loss), finite; at least one client.
        weights: client -> weight, not negative, not all zero (usually its number of samples); all equal by
            default.
        higher_is_better: what "worst" means; False for losses.

    Raises:
        DataError: no clients, a value that is not finite, or weights that do not fit.
    """
    if not values:
        raise DataError(
            "Cannot sum up over clients: there are none. Check that at least one client reported."
        )
    names = sorted(values)
    bad = [name for name in names if not math.isfinite(values[name])]
    if bad:
        raise DataError(
            f"Client {bad[0]} reported {values[bad[0]]!r}, which is not finite. Leave it out, and say so."
        )
    share = weights if weights is not None else dict.fromkeys(names, 1.0)
    if set(share) != set(names):
        odd = sorted(set(share) ^ set(names))
        raise DataError(f"Weights and values must name the same clients; {odd} is in one of them only.")
    if any(not math.isfinite(w) or w < 0 for w in share.values()) or not any(share.values()):
        raise DataError(
            f"Client weights must be finite, not negative, and not all zero; got {dict(share)!r:.200}."
        )
    total = math.fsum(share[name] for name in names)
    numbers = [values[name] for name in names]
    plain = math.fsum(numbers) / len(numbers)
    worst = min(names, key=lambda name: values[name] if higher_is_better else -values[name])
    return ClientSpread(
        mean=math.fsum(values[name] * (share[name] / total) for name in names),
        plain_mean=plain,
        deviation=math.sqrt(math.fsum((number - plain) ** 2 for number in numbers) / len(numbers)),
        low=min(numbers),
        high=max(numbers),
        worst_client=worst,
        clients=len(names),
    )
