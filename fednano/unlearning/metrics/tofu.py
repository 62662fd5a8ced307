"""TOFU's own evaluation log (``eval_log_aggregated.json``) to forget quality and model utility.

The file maps four question sets to their measurements, each by question index::

    {"eval_log.json":         {"avg_gt_loss": {"0": 1.2, ...}, "rougeL_recall": {...},
                               "avg_paraphrased_loss": {...}, "average_perturb_loss": {"0": [2.1, ...], ...}},
     "eval_log_forget.json": {...}, "eval_real_author_wo_options.json": {...}, "eval_real_world_wo_options.json": {...}}

The truth ratio takes the geometric mean over wrong answers, as TOFU's published tables do. Two logs are compared only
where they are of the same questions: a forget set of 40 against one of 400 has a p-value that means nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fednano.errors import DataError
from fednano.unlearning.metrics.quality import ForgetQuality, forget_quality, truth_ratio, truth_ratio_score
from fednano.unlearning.metrics.utility import model_utility

__all__ = ["TofuReport", "evaluate_tofu", "read_log"]

FORGET = "eval_log_forget.json"
SETS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": FORGET,
}
_LOSS, _ROUGE, _PARAPHRASE, _WRONG = (
    "avg_gt_loss",
    "rougeL_recall",
    "avg_paraphrased_loss",
    "average_perturb_loss",
)

Log = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TofuReport:
    """What a log says.

    Attributes:
        model_utility: harmonic mean of the nine parts.
        utility_parts: by name, see `UTILITY_PARTS`.
        forget: probability, rouge_l and truth_ratio of the forget set.
        forget_quality: against the reference; ``None``: no reference was given, so it does not exist.
        questions: number of questions of each set.
    """

    model_utility: float
    utility_parts: dict[str, float]
    forget: dict[str, float]
    forget_quality: ForgetQuality | None
    questions: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an infinite logarithm becomes null."""
        quality = None
        if self.forget_quality is not None:
            log = self.forget_quality.log10_p
            quality = {**asdict(self.forget_quality), "log10_p": log if math.isfinite(log) else None}
        return {**asdict(self), "forget_quality": quality}


def read_log(path: str | Path) -> Log:
    """Read and check an evaluation log.

    Raises:
        DataError: the file is missing, no JSON, or lacks a question set or a measurement; the message names it.
    """
    where = Path(path)
    try:
        found = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the evaluation log {where} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"the evaluation log {where} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} holds {type(found).__name__}; expected an object of question sets.")
    missing = [name for name in SETS.values() if name not in found]
    if missing:
        raise DataError(
            f"{where} lacks the question sets {', '.join(missing)}; it has {', '.join(sorted(found)) or 'none'}. "
            "Give TOFU's eval_log_aggregated.json, which holds all four."
        )
    for name in SETS.values():
        _check_set(where, name, found[name])
    return found


def _check_set(where: Path, name: str, group: Any) -> None:
    if not isinstance(group, dict):
        raise DataError(f"{where}: {name} holds {type(group).__name__}; expected an object.")
    for metric in (_LOSS, _ROUGE, _PARAPHRASE, _WRONG):
        values = group.get(metric)
        if not isinstance(values, dict) or not values:
            raise DataError(
                f"{where}: {name} lacks {metric}; expected an object from question index to value."
            )
        if set(values) != set(group[_LOSS]):
            raise DataError(
                f"{where}: {name} has {metric} for {len(values)} questions and {_LOSS} for {len(group[_LOSS])}; "
                "expected the same questions."
            )
        for index, value in values.items():
            numbers = value if metric == _WRONG else [value]
            if (
                not isinstance(numbers, list)
                or not numbers
                or not all(
                    isinstance(number, int | float) and math.isfinite(number) and number >= 0
                    for number in numbers
                )
            ):
                expected = "a list of losses" if metric == _WRONG else "a number that is not negative"
                raise DataError(
                    f"{where}: {name}, {metric}, question {index}: got {value!r:.60}; expected {expected}."
                )


def evaluate_tofu(log: Log, reference: Log | None = None) -> TofuReport:
    """Forget quality and model utility of a log.

    Args:
        log: of the unlearned model, from `read_log`.
        reference: of the model that was trained without the forget set (retain99 for forget01, retain95 for forget05,
            retain90 for forget10); without it there is no forget quality.

    Raises:
        DataError: the two logs are not of the same forget questions.
    """
    parts: dict[str, float] = {}
    for group, name in SETS.items():
        values = log[name]
        normalised = group in ("real_authors", "world_facts")
        parts[f"{group}.probability"] = fmean(_probabilities(values, normalised=normalised))
        parts[f"{group}.rouge_l"] = fmean(values[_ROUGE].values())
        parts[f"{group}.truth_ratio"] = truth_ratio_score(_ratios(values), forget=group == "forget")
    utility = {name: value for name, value in parts.items() if not name.startswith("forget.")}
    quality = None
    if reference is not None:
        _same_questions(log[FORGET], reference[FORGET])
        quality = forget_quality(_ratios(log[FORGET]), _ratios(reference[FORGET]))
    return TofuReport(
        model_utility=model_utility(utility),
        utility_parts=utility,
        forget={name.removeprefix("forget."): v for name, v in parts.items() if name.startswith("forget.")},
        forget_quality=quality,
        questions={group: len(log[name][_LOSS]) for group, name in SETS.items()},
    )


def _probabilities(values: Mapping[str, Any], *, normalised: bool) -> list[float]:
    """Probability of each right answer; for multiple choice, its share of all answers' probability."""
    found = []
    for index, loss in values[_LOSS].items():
        right = math.exp(-loss)
        if normalised:
            right /= right + float(np.exp(-np.asarray(values[_WRONG][index])).sum())
        found.append(right)
    return found


def _ratios(values: Mapping[str, Any]) -> list[float]:
    return [truth_ratio(values[_WRONG][index], loss) for index, loss in values[_PARAPHRASE].items()]


def _same_questions(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    mine, other = set(ours[_PARAPHRASE]), set(theirs[_PARAPHRASE])
    advice = "Compare forget01 with retain99, forget05 with retain95, forget10 with retain90."
    if mine != other:
        raise DataError(
            f"the log has {len(mine)} forget questions and the reference {len(other)}, which are not the same ones; "
            f"their truth ratios cannot be compared. {advice}"
        )
    texts, others = ours.get("generated_text"), theirs.get("generated_text")
    if isinstance(texts, dict) and isinstance(others, dict):
        for index in mine & set(texts) & set(others):
            if _truth(texts[index]) != _truth(others[index]):
                raise DataError(
                    f"forget question {index} is {_truth(texts[index])!r:.60} in the log and "
                    f"{_truth(others[index])!r:.60} in the reference: two different question sets. {advice}"
                )


def _truth(entry: Any) -> Any:
    """The right answer of an entry ``[prompt, what the model said, right answer]``; prompts differ between models."""
    return entry[2].strip() if isinstance(entry, list) and len(entry) == 3 else None
