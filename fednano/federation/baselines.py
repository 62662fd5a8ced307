"""What the federated result is to be compared with, in the same run: the same model, data, seed and sample visits."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import fmean

from fednano.aggregation import Rule, Spec, check_combination, create_rule
from fednano.aggregation.drift import Scaffold
from fednano.aggregation.robust import Bulyan
from fednano.errors import ConfigError
from fednano.federation.config import RunConfig
from fednano.federation.judging import judge_all, record_accuracy
from fednano.federation.model import gathers
from fednano.federation.private import check_private
from fednano.federation.recipe import parse_settings
from fednano.federation.rounds import Federation, Leaves, PhaseResult, run_pooled, run_rounds, run_separate
from fednano.federation.schedules import check_schedules
from fednano.federation.secure import check_secure
from fednano.federation.uplink import codec_for

__all__ = ["BaselineResult", "build_rule", "check_rule", "other_rule", "run_baselines"]


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
    other = other_rule(fed.config)
    return {
        other: _other_rule(fed, other, start),
        "local-only": _local_only(fed, start),
        "centralised": _centralised(fed, start),
    }


def build_rule(config: RunConfig, name: str) -> Rule:
    """A merge rule by name, with the options that the run's settings give it.

    Raises:
        ConfigError: no rule has that name, or it has no such option.
    """
    options = parse_settings(config.rule_options, "rule-options") if name == config.rule else {}
    rule = create_rule(name, **options)
    if isinstance(rule, Scaffold) and not rule.clients:
        return replace(rule, clients=config.clients)
    if isinstance(rule, Bulyan) and "malicious" not in options:
        # As many as so few clients can bear; who asks for more by name is told.
        return replace(
            rule, malicious=min(rule.malicious, max(0, config.participants(config.clients) - 3) // 4)
        )
    return rule


def other_rule(config: RunConfig) -> str:
    """The rule that a run with baselines is compared with."""
    return "fedavg" if config.rule == "fisher" else "fisher"


def check_rule(rule: Rule, spec: Spec, config: RunConfig) -> None:
    """Refuse, before anything is trained, a rule that cannot be right with the run's adapter, codec or late replies.

    Raises:
        ConfigError: with the reason.
    """
    codec_for(config.codec, config.codec_options)
    taking_part = config.participants(config.clients)
    if isinstance(rule, Bulyan) and taking_part < 4 * rule.malicious + 3:
        raise ConfigError(
            f"rule 'bulyan' needs {4 * rule.malicious + 3} updates a round against {rule.malicious} malicious clients, "
            f"and {taking_part} take part. Lower malicious, or raise clients or fraction."
        )
    check_schedules(rule, config)
    check_secure(config, gathers(config))
    check_private(rule, spec, config, gathers(config))
    if config.keep == "best" and {"personal", "personal_adapter"} & set(rule.client_config(1)):
        raise ConfigError(
            f"rule {rule.name!r} leaves personal adapters with the clients, which keep their last ones only, so keep "
            "'best' cannot bring them back. Set keep to 'last'."
        )
    check_combination(
        rule,
        spec.algebra,
        products=bool(spec.products),
        secure_aggregation=config.secure_aggregation,
        differential_privacy=config.dp != "off",
        ranks_differ=bool(config.own_ranks),
        codec=config.codec,
        late=config.late == "buffer",
    )


def _other_rule(fed: Federation, name: str, start: Leaves) -> BaselineResult:
    rule = build_rule(fed.config, name)
    check_rule(rule, fed.spec, fed.config)
    began = time.monotonic()
    fed.view.phase_started(name, fed.config.rounds)
    result = run_rounds(fed, name, rule, PhaseResult(start))
    judged = judge_all(fed, name, result.rounds, result.tuned)
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
    fed.view.evaluation(
        *("local-only", fed.config.rounds), accuracy=mean, samples=len(samples), metric=fed.evaluator.title
    )
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
    note = "one client with everybody's data and as many sample visits as the clients of each round together"
    return BaselineResult(judged.accuracy, judged.loss, result.rounds, time.monotonic() - began, note)
