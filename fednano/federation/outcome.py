"""Write what a run ends with: sample predictions, summary, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fednano.data import Sample, decode_image
from fednano.evaluation import across_clients, score_each
from fednano.federation.baselines import BaselineResult
from fednano.federation.evaluator import Judgement
from fednano.federation.marking import given_answers
from fednano.federation.private import privacy_of
from fednano.federation.rounds import MAIN_PHASE, Federation, PhaseResult
from fednano.models.edge import NanoEdge
from fednano.models.load import count_parameters
from fednano.runs import Phase, Summary

__all__ = ["summarise", "write_outcome"]

_PREDICTIONS = 24


def write_outcome(
    fed: Federation,
    *,
    edge: NanoEdge,
    zero_shot: Judgement,
    final: Judgement,
    result: PhaseResult,
    phase_seconds: float,
    baselines: Mapping[str, BaselineResult],
    wall_seconds: float,
) -> Path:
    """Write ``predictions.json``, ``summary.json`` and ``report.html``; show the table. Returns the report's path."""
    _write_predictions(fed, zero_shot, final)
    summary = summarise(
        fed,
        edge=edge,
        zero_shot=zero_shot,
        final=final,
        result=result,
        phase_seconds=phase_seconds,
        baselines=baselines,
        wall_seconds=wall_seconds,
    )
    fed.folder.write_summary(summary)
    from fednano.runs.report import render_report

    report = render_report(fed.folder.path)
    fed.view.finish(summary, report=report)
    return report


def summarise(
    fed: Federation,
    *,
    edge: NanoEdge,
    zero_shot: Judgement,
    final: Judgement,
    result: PhaseResult,
    phase_seconds: float,
    baselines: Mapping[str, BaselineResult],
    wall_seconds: float,
) -> Summary:
    """The outcome as one checked object; every number in it was measured in this run."""
    wire, config = result.wire, fed.config
    phases = {
        "zero_shot": Phase(accuracy=zero_shot.accuracy, loss=zero_shot.loss, note="the model before tuning"),
        "federated": Phase(
            accuracy=final.accuracy,
            rounds=result.rounds,
            seconds=phase_seconds,
            loss=final.loss,
            note=f"{len(fed.nodes)} clients, merged by {config.rule}",
        ),
    }
    for name, base in baselines.items():
        key = name.replace("-", "_")
        phases[key] = Phase(base.accuracy, base.rounds, base.seconds, base.loss, base.note)
    parameters = count_parameters(config.model)
    spread = {name: base.spread for name, base in baselines.items() if base.spread is not None}
    return Summary(
        accuracy={name: phase.accuracy for name, phase in phases.items()},
        bytes={
            "adapter_up_per_client_round": _mean(wire.adapter_up, wire.updates),
            "adapter_down_per_client_round": _mean(wire.adapter_down, wire.requests),
            "activation_up_per_sample_step": _mean(wire.activation_up, wire.samples),
            "activation_down_per_sample_step": _mean(wire.activation_down, wire.samples),
            "adapter_total": wire.adapter_up + wire.adapter_down,
            "activation_total": wire.activation_up + wire.activation_down,
        },
        parameters={
            "model": parameters["model"] + edge.parameter_count(),
            "edge": parameters["edge"] + edge.parameter_count(),
            "trainable": edge.parameter_count(),
        },
        rounds=result.rounds,
        clients=len(fed.nodes),
        seed=config.seed,
        wall_seconds=wall_seconds,
        rule=config.rule,
        adapter=config.adapter,
        model=config.model,
        dataset=config.dataset,
        phases=phases,
        test_samples=len(fed.evaluator.samples(config.final_samples)),
        metric=fed.evaluator.metric,
        scores={"zero_shot": zero_shot.scores, "federated": final.scores},
        extra={
            "placement": config.placement,
            "spread": spread,
            "training_samples": wire.samples,
            "on_clients": _on_clients(fed),
        }
        | ({"privacy": privacy_of(fed, result.rounds)} if config.dp != "off" else {}),
    )


def _on_clients(fed: Federation) -> dict[str, object] | None:
    """What the clients' own judgements of the final adapters have in common; ``None`` where they made none."""
    rows = [
        row
        for row in fed.folder.metrics()
        if row["phase"] == MAIN_PHASE and row["scope"] == "client" and row.get("final")
    ]
    if not rows:
        return None
    found = across_clients(
        {row["client"]: row["accuracy"] for row in rows}, {row["client"]: row["samples"] for row in rows}
    )
    return asdict(found)


def _mean(total: int, count: int) -> float:
    return total / count if count else 0.0


def _write_predictions(fed: Federation, zero_shot: Judgement, final: Judgement) -> None:
    samples = fed.evaluator.samples(fed.config.final_samples)
    rows = []
    for index in _varied(samples, zero_shot, final):
        sample = samples[index]
        row: dict[str, object] = {
            "id": sample.id,
            "question": sample.question,
            "answer": sample.answer,
            "zero_shot": zero_shot.answers[index],
            MAIN_PHASE: final.answers[index],
            "scores": {
                name: score_each(fed.evaluator.metric, judged.answers[index], given_answers(sample))
                for name, judged in (("zero_shot", zero_shot), (MAIN_PHASE, final))
            },
        }
        if sample.image is not None:
            row["image"] = fed.folder.save_image(f"sample-{index:05d}", decode_image(sample.image))
        rows.append(row)
    fed.folder.write_json("predictions.json", rows)


def _varied(samples: Sequence[Sample], zero_shot: Judgement, final: Judgement) -> list[int]:
    """Indices to show: every fourth place to a wrong answer of the tuned model, and answers in turn.

    Right answers alone would flatter; a random draw would mostly show the commonest answer.
    """
    wrong = [i for i, sample in enumerate(samples) if final.answers[i] != sample.answer]
    right: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        if final.answers[index] == sample.answer:
            # Those that tuning put right come first: they show what it did.
            fixed = zero_shot.answers[index] != sample.answer
            right.setdefault(sample.answer, []).insert(
                0 if fixed else len(right.get(sample.answer, [])), index
            )
    chosen = wrong[:: max(1, len(wrong) // (_PREDICTIONS // 4))][: _PREDICTIONS // 4]
    turn = 0
    while len(chosen) < min(_PREDICTIONS, len(samples)):
        left = [answers for answers in right.values() if turn < len(answers)]
        if not left:
            break
        chosen.extend(answers[turn] for answers in left[: _PREDICTIONS - len(chosen)])
        turn += 1
    return sorted(chosen)
