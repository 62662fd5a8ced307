"""Judging one answer: exact match, VQA accuracy, token F1.

``normalise`` makes answers comparable: case, white space, punctuation and articles do not count, number words
are digits. It follows the rules of the VQA evaluation (Antol et al. 2015, arXiv:1505.00468, section on
accuracy) with one difference: apostrophes are removed on both sides, where the official script restores them
from a list of contractions ("dont" and "don't" are equal either way).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from fednano.errors import DataError

__all__ = ["exact_match", "normalise", "token_f1", "vqa_accuracy"]

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_APOSTROPHES = re.compile("['\u2019\u2018`]")
# A comma between digits groups thousands; a point or colon between digits belongs to the number or the time.
_GROUPING = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BETWEEN_DIGITS = re.compile(r"(?<=\d)[.:](?=\d)")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalise(text: str) -> str:
    """The form in which two answers are compared.

    Idempotent. ``" The Two Dogs. "`` becomes ``"2 dogs"``; an answer that is nothing but an article keeps it.

    Args:
        text: an answer.
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    plain = _GROUPING.sub("", _APOSTROPHES.sub("", plain))
    kept: list[str] = []
    for word in plain.split():
        if _BETWEEN_DIGITS.search(word):
            # "3.5" and "10:30" stay one word; anything else around the digits goes
            stripped = word.strip(string.punctuation)
            parts = re.split(r"([^\w.:]|_)", stripped)
            kept += [part for part in parts if part.strip(string.punctuation)]
        else:
            kept += word.translate(_PUNCTUATION).split()
    words = [_NUMBERS.get(word, word) for word in kept]
    # An answer that is punctuation and nothing else ("+", "?") is compared as it stands, or all such would be equal.
    return " ".join([word for word in words if word not in _ARTICLES] or words or plain.split())


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the prediction is the answer, after ``normalise``.

    Args:
        prediction: what the model said.
        answer: the right answer.
    """
    return normalise(prediction) == normalise(answer)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy: how many of the people asked gave the predicted answer, three being enough.

    With the answers of ``n`` people, ``n >= 2``: the mean over all ways to leave one person out of
    ``min(matches / 3, 1)``, which makes the score comparable to that of a person (VQA evaluation; ``n`` is 10
    there). With one answer: exact match.

    Args:
        prediction: what the model said.
        answers: what people said, ``(n,)``, ``n >= 1``.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: ``answers`` is empty.
    """
    if not answers:
        raise DataError(
            "VQA accuracy needs at least one answer to compare with, got none. Check the data set's rows."
        )
    said = normalise(prediction)
    matches, people = sum(normalise(answer) == said for answer in answers), len(answers)
    if people == 1:
        return float(matches)
    # Leaving out one of the `matches` people who agree leaves matches - 1; leaving out another leaves all.
    agree, others = min((matches - 1) / 3, 1.0), min(matches / 3, 1.0)
    return (matches * agree + (people - matches) * others) / people


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, after ``normalise`` (SQuAD, arXiv:1606.05250, section
    6.1).

    Args:
        prediction: what the model said.
        answer: the right answer.

    Returns:
        A number in [0, 1]; 1 where both are empty.
    """
    said, right = Counter(normalise(prediction).split()), Counter(normalise(answer).split())
    if not said or not right:
        return float(said == right)
    common = (said & right).total()
    return 2 * common / (said.total() + right.total())
