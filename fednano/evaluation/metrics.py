"""Metrics by name: what many answers are worth together, in [0, 1], higher better.

Which metric fits is a matter of the data; the kinds of data in `fednano.data` name theirs. Perplexity is not among
them: it follows from the answers' loss, see `perplexity`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from fednano.errors import DataError
from fednano.evaluation.answers import exact_match, normalise, token_f1, vqa_accuracy
from fednano.evaluation.rouge import rouge_l

__all__ = ["METRICS", "TITLES", "choice", "entity_f1", "macro_f1", "perplexity", "score_by", "score_each"]

Answers = Sequence[Sequence[str]]
"""For each sample the right answer first, then all the answers that people gave, ``(n,)``."""

_LETTER = re.compile(r"^\W*([A-Za-z])(?:\W|$)|\b(?:answer|option)(?: is)?:?\s*\(?([A-Za-z])\b", re.IGNORECASE)


def choice(prediction: str, answer: str) -> float:
    """1 where the letter that the prediction names is the right one: ``"(B) blue"`` names B, so does ``"the answer is
    b"``."""
    found = _LETTER.search(prediction)
    said = next((group for group in found.groups() if group), "") if found else ""
    return float(said.upper() == answer.strip().upper())


def _entities(text: str) -> Counter[tuple[str, str]]:
    """``"PER: Ada Lovelace; LOC: London"`` as pairs; anything that is no such pair is none."""
    pairs = (part.partition(":") for part in text.split(";"))
    return Counter((normalise(kind), normalise(words)) for kind, colon, words in pairs if colon)


def entity_f1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Micro-averaged F1 over tagged parts: a part counts where type and words are right (CoNLL-2003, Tjong Kim Sang
    and De Meulder). 1 where there is nothing to find and nothing was found.

    Args:
        predictions: what the model said, ``(n,)``.
        answers: the right parts, ``(n,)``, as ``"type: words; type: words"``.
    """
    hits = said = right = 0
    for prediction, answer in zip(predictions, answers, strict=True):
        found, wanted = _entities(prediction), _entities(answer)
        hits, said, right = hits + (found & wanted).total(), said + found.total(), right + wanted.total()
    return 2 * hits / (said + right) if said + right else 1.0


def macro_f1(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Mean of the classes' F1, over the classes that occur among the right answers.

    Args:
        predictions: what the model said, ``(n,)``.
        answers: the right classes, ``(n,)``.
    """
    said, right = [normalise(text) for text in predictions], [normalise(text) for text in answers]
    hits = Counter(a for a, b in zip(said, right, strict=True) if a == b)
    predicted, actual = Counter(said), Counter(right)
    return math.fsum(2 * hits[name] / (predicted[name] + actual[name]) for name in actual) / len(actual)


def _mean(each: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[str], Answers], float]:
    def over(predictions: Sequence[str], answers: Answers) -> float:
        return math.fsum(each(said, right) for said, right in zip(predictions, answers, strict=True)) / len(
            predictions
        )

    return over


def _over_all(
    score: Callable[[Sequence[str], Sequence[str]], float],
) -> Callable[[Sequence[str], Answers], float]:
    return lambda predictions, answers: score(predictions, [right[0] for right in answers])


_EACH: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact-match": lambda said, right: float(exact_match(said, right[0])),
    "vqa": lambda said, right: vqa_accuracy(said, right[1:] or right),
    "choice": lambda said, right: choice(said, right[0]),
    "token-f1": lambda said, right: token_f1(said, right[0]),
    "rouge-l": lambda said, right: rouge_l(said, right[0]).f1,
    "entity-f1": lambda said, right: entity_f1([said], [right[0]]),
    "macro-f1": lambda said, right: float(exact_match(said, right[0])),
}

METRICS: Mapping[str, Callable[[Sequence[str], Answers], float]] = {
    **{name: _mean(each) for name, each in _EACH.items()},
    "entity-f1": _over_all(entity_f1),
    "macro-f1": _over_all(macro_f1),
}
"""Metric by name: predictions ``(n,)``, n >= 1, and the samples' answers to a score in [0, 1]."""

TITLES: Mapping[str, str] = {
    "exact-match": "Accuracy",
    "vqa": "VQA accuracy",
    "choice": "Accuracy",
    "token-f1": "Token F1",
    "macro-f1": "Macro F1",
    "rouge-l": "ROUGE-L",
    "entity-f1": "Entity F1",
}
"""Metric by name, as people read it."""


def score_by(name: str, predictions: Sequence[str], answers: Answers) -> float:
    """The score of predictions by one metric.

    Args:
        name: a key of `METRICS`.
        predictions: what the model said, ``(n,)``, n >= 1.
        answers: for each sample the right answer, then those that people gave.

    Raises:
        DataError: there is no such metric, nothing to score, or the lengths differ.
    """
    if name not in METRICS:
        raise DataError(f"unknown metric {name!r}; expected one of {', '.join(METRICS)}.")
    if not predictions or len(predictions) != len(answers):
        raise DataError(
            f"scoring needs as many predictions as answers, at least one; got {len(predictions)} and {len(answers)}."
        )
    return METRICS[name](predictions, answers)


def score_each(name: str, prediction: str, answers: Sequence[str]) -> float:
    """The score of one prediction; a metric that is defined over many falls back to what it is for one."""
    return _EACH[name](prediction, answers)


def perplexity(loss: float) -> float:
    """``exp`` of a mean loss in nats a token; infinite beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
