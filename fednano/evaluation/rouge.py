"""ROUGE-L of an answer (Lin 2004): the longest common subsequence of words.

Words are runs of ``a-z0-9`` after lower-casing, as in the package rouge-score; there is no stemming, which TOFU's own
script switches on, so that a plural does not count as its singular here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Rouge", "rouge_l"]

_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Rouge:
    """ROUGE-L of one answer; each in ``[0, 1]``.

    Attributes:
        recall: common subsequence over words of the right answer: what TOFU reports.
        precision: over words of the prediction.
        f1: their harmonic mean: what MUSE reports.
    """

    recall: float
    precision: float
    f1: float


def rouge_l(prediction: str, answer: str) -> Rouge:
    """ROUGE-L; all zero where either text has no word.

    Args:
        prediction: what the model said.
        answer: the right answer.
    """
    said, right = _WORD.findall(prediction.lower()), _WORD.findall(answer.lower())
    common = _common_subsequence(said, right)
    if not common:
        return Rouge(0.0, 0.0, 0.0)
    return Rouge(common / len(right), common / len(said), 2 * common / (len(said) + len(right)))


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence; memory of one row."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0  # the row above, one column to the left
        for column, other in enumerate(b, start=1):
            above = row[column]
            row[column] = before + 1 if word == other else max(above, row[column - 1])
            before = above
    return row[-1]
