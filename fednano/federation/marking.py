"""Judge answers by the metric that fits the data."""

from __future__ import annotations

from collections.abc import Sequence

from fednano.data import KINDS, Dataset, Sample
from fednano.evaluation import score_by

__all__ = ["given_answers", "metric_of", "scores_of"]


def given_answers(sample: Sample) -> tuple[str, ...]:
    """The right answer, then all that people gave."""
    return (sample.answer, *sample.answers)


def metric_of(metric: str, dataset: Dataset) -> str:
    """The metric to judge a data set by: the setting's, or where that is ``auto`` the one that fits.

    VQA accuracy is meant for several answers a question; with one each it is exact match, and called so.
    """
    if metric != "auto":
        return metric
    main = KINDS[dataset.kind].metrics[0]
    return "exact-match" if main == "vqa" and not any(s.answers for s in dataset) else main


def scores_of(metric: str, kind: str, answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Every metric that fits, the one to judge by first.

    Args:
        metric: the one to judge by; ``auto``: the first of the kind.
        kind: of the data.
        answers: what the model said, ``(n,)``, n >= 1.
        samples: what it was asked, ``(n,)``.
    """
    names = [] if metric == "auto" else [metric]
    names += [name for name in KINDS[kind].metrics if name not in names]
    if len(names) > 1 and names[0] != "vqa" and not any(sample.answers for sample in samples):
        names = [name for name in names if name != "vqa"]  # with one answer each it is exact match
    right = [given_answers(sample) for sample in samples]
    return {name: score_by(name, answers, right) for name in names}
