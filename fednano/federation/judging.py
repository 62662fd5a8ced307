"""Judge adapters before the first round and after the last one, show the result and write it down."""

from __future__ import annotations

from collections.abc import Mapping

from fednano.federation.evaluator import Judgement
from fednano.federation.rounds import Federation, Leaves

__all__ = ["judge_all", "record_accuracy"]


def judge_all(fed: Federation, phase: str, number: int, leaves: Leaves) -> Judgement:
    """Answer the questions of the first and last evaluation with the adapters of round ``number`` of a phase."""
    samples = fed.evaluator.samples(fed.config.final_samples)
    judged = fed.evaluator.judge(leaves, samples)
    fed.view.evaluation(
        phase,
        number,
        accuracy=judged.accuracy,
        loss=judged.loss,
        samples=len(samples),
        metric=fed.evaluator.title,
    )
    record_accuracy(fed, phase, number, judged.accuracy, judged.loss, len(samples), judged.scores)
    return judged


def record_accuracy(
    fed: Federation,
    phase: str,
    number: int,
    accuracy: float,
    loss: float | None,
    samples: int,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Append a phase's final figures, over ``samples`` questions, to the run's metrics."""
    record: dict[str, object] = {
        "phase": phase,
        "round": number,
        "scope": "global",
        "final": True,
        "accuracy": accuracy,
        "samples": samples,
    }
    if loss is not None:
        record["loss"] = loss
    if scores:
        record["scores"] = dict(scores)
    fed.folder.append_metrics(record)
