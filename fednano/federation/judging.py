"""Judge adapters before the first round and after the last one, show the result and write it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fednano.data import Sample
from fednano.federation.evaluator import Judgement
from fednano.federation.rounds import Federation, Leaves
from fednano.runs.text import ZERO_SHOT

__all__ = ["judge_all", "judge_start", "record_accuracy"]


def judge_start(fed: Federation, start: Leaves) -> Judgement | None:
    """Answer the questions of the evaluations between rounds before training: the first point of the curve.

    The whole test set is answered after training (`judge_all`), so that the first training step need not wait for it.

    Returns:
        The judgement where these questions are the whole set, which need not be asked again.
    """
    fewer = fed.evaluator.samples(fed.config.evaluate_samples)
    if len(fewer) >= len(fed.evaluator.samples(fed.config.final_samples)):
        return judge_all(fed, ZERO_SHOT, 0, start)
    _judge(fed, ZERO_SHOT, 0, start, fewer, final=False)
    return None


def judge_all(fed: Federation, phase: str, number: int, leaves: Leaves) -> Judgement:
    """Answer the questions of the last evaluation with the adapters of round ``number`` of a phase."""
    samples = fed.evaluator.samples(fed.config.final_samples)
    return _judge(fed, phase, number, leaves, samples, final=True)


def _judge(
    fed: Federation, phase: str, number: int, leaves: Leaves, samples: Sequence[Sample], *, final: bool
) -> Judgement:
    judged = fed.evaluator.judge(leaves, samples)
    fed.view.evaluation(
        phase,
        number,
        accuracy=judged.accuracy,
        loss=judged.loss,
        samples=len(samples),
        metric=fed.evaluator.title,
    )
    record_accuracy(
        fed, phase, number, judged.accuracy, judged.loss, len(samples), judged.scores, final=final
    )
    return judged


def record_accuracy(
    fed: Federation,
    phase: str,
    number: int,
    accuracy: float,
    loss: float | None,
    samples: int,
    scores: Mapping[str, float] | None = None,
    *,
    final: bool = True,
) -> None:
    """Append a phase's figures over ``samples`` questions, its last ones if ``final``, to the run's metrics."""
    record: dict[str, object] = {
        "phase": phase,
        "round": number,
        "scope": "global",
        "accuracy": accuracy,
        "samples": samples,
    }
    if final:
        record["final"] = True
    if loss is not None:
        record["loss"] = loss
    if scores:
        record["scores"] = dict(scores)
    fed.folder.append_metrics(record)
