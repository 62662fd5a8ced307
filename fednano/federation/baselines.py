"""What the federated result is to be compared with, in the same run: the same model, data, seed and sample visits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean

from fednano.aggregation import Rule, check_combination, create_rule
from fednano.errors import ConfigError
from fednano.federation.client_task import ADVICE
from fednano.federation.config import RunConfig, parse_settings
from fednano.federation.judging import judge_all, record_accuracy
from fednano.federation.rounds import Federation, Leaves, PhaseResult, run_pooled, run_rounds, run_separate

__all__ = ["BaselineResult", "build_rule", "run_baselines"]


@dataclass(frozen=True)
class BaselineResult:
    """One baseline.

    Attributes:
        accuracy: exact match on the test set.
        loss: answer loss on the test set; ``None`` where several adapters were judged.
        rounds: rounds it trained.
        seconds: wall time.
        note: what the number is.
        spread: lowest and highest accuracy over clients, where there are several.
    """

    accuracy: float
    loss: float | None
    rounds: int
    seconds: float
    note: str
    spread: tuple[float, float] | None = None


def run_baselines(fed: Federation, start: Leaves) -> dict[str, BaselineResult]:
    """Run local-only, centralised, and the other of FedAvg and Fisher merging.

    Raises:
        ConfigError: the clients are real sites, whose data cannot be pooled.
    """
    if fed.simulated is False:
        raise ConfigError(
            "baselines need everybody's data in one place, which only a simulation has. Switch baselines off."
        )
    other = "fedavg" if fed.config.rule == "fisher" else "fisher"
    return {
        other: _other_rule(fed, other, start),
        "local-only": _local_only(fed, start),
        "centralised": _centralised(fed, start),
    }


def build_rule(config: RunConfig, name: str) -> Rule:
    """A merge rule by name, with the options that the run's settings give it.

    Raises:
        ConfigError: no rule has that name, it has no such option, or it needs something of the clients that runs
            cannot give it yet.
    """
    options = parse_settings(config.rule_options, "rule-options") if name == config.rule else {}
    rule = create_rule(name, **options)
    needs = sorted({key for number in (1, 2) for key in rule.client_config(number)} - ADVICE)
    if type(rule).downlink is not Rule.downlink:
        needs.append("more than the adapter on the way down")
    if needs:
        raise ConfigError(
            f"rule {name!r} needs of the clients: {', '.join(needs)}. Runs cannot give it that yet; as a library it is "
            "in fednano.aggregation. Choose another rule, such as 'fedavg', 'fisher' or 'flexlora'."
        )
    return rule


def _other_rule(fed: Federation, name: str, start: Leaves) -> BaselineResult:
    rule = build_rule(fed.config, name)
    check_combination(rule, fed.spec.algebra)
    began = time.monotonic()
    fed.view.phase_started(name, fed.config.rounds)
    result = run_rounds(fed, name, rule, PhaseResult(start))
    judged = judge_all(fed, name, result.rounds, result.leaves)
    note = f"the same rounds, merged by {name} instead of {fed.config.rule}"
    return BaselineResult(judged.accuracy, judged.loss, result.rounds, time.monotonic() - began, note)


def _local_only(fed: Federation, start: Leaves) -> BaselineResult:
    began = time.monotonic()
    fed.view.phase_started("local-only", fed.config.rounds)
    results = run_separate(fed, "local-only", start)
    samples = fed.evaluator.samples(fed.config.final_samples)
    scores = []
    for client, result in results.items():
        judged = fed.evaluator.judge(result.leaves, samples, loss=False)
        scores.append(judged.accuracy)
        fed.folder.append_metrics(
            {
                "phase": "local-only",
                "round": result.rounds,
                "scope": "client",
                "final": True,
                "client": client,
                "accuracy": judged.accuracy,
                "samples": len(samples),
            }
        )
    mean = fmean(scores)
    fed.view.evaluation("local-only", fed.config.rounds, accuracy=mean, samples=len(samples))
    record_accuracy(fed, "local-only", fed.config.rounds, mean, None, len(samples))
    note = f"mean of {len(scores)} clients that train alone, each judged on the whole test set"
    return BaselineResult(
        mean, None, fed.config.rounds, time.monotonic() - began, note, (min(scores), max(scores))
    )


def _centralised(fed: Federation, start: Leaves) -> BaselineResult:
    began = time.monotonic()
    fed.view.phase_started("centralised", fed.config.rounds)
    result = run_pooled(fed, "centralised", start)
    judged = judge_all(fed, "centralised", result.rounds, result.leaves)
    note = "one client with everybody's data and as many sample visits as all clients together"
    return BaselineResult(judged.accuracy, judged.loss, result.rounds, time.monotonic() - began, note)
