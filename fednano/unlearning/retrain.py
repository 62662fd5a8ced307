"""Exact unlearning: train again, without the samples, from the checkpoint before any of them was seen.

The checkpoint of the round before was made without them, and every later round is trained anew: no gradient of a
forgotten sample is in the result. With nothing to forget and from the start, the result is the run's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fednano.aggregation import Rule, Update, create_rule, validate
from fednano.errors import ConfigError, Interrupted
from fednano.federation.config import RunConfig
from fednano.federation.model import settled
from fednano.federation.recipe import parse_settings
from fednano.federation.server import spec_of
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.runs import RunFolder
from fednano.training.data import ClientData, draw
from fednano.training.fisher import empirical_fisher
from fednano.training.guard import Forgotten, guard_of
from fednano.training.local import TrainSettings, train_local
from fednano.training.seeds import stream_seed

__all__ = ["Retrained", "retrain", "starting_point"]

_CAN = frozenset({"fisher", "proximal_mu"})


@dataclass(frozen=True)
class Retrained:
    """One retrained round.

    Attributes:
        round: its number in the run.
        leaves: the merged adapter after it.
        loss: mean training loss over clients.
        seconds: client-seconds.
        steps: optimiser steps of all clients.
        clients: how many of them there were.
    """

    round: int
    leaves: dict[str, Tensor]
    loss: float
    seconds: float
    steps: int
    clients: int = 0


def starting_point(
    folder: RunFolder, exposure: int, fresh: Mapping[str, Tensor]
) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    """The newest state that no forgotten sample has touched.

    Args:
        folder: the run.
        exposure: the first round that trained on one of them.
        fresh: leaves as the seed made them, before the first round.

    Returns:
        Rounds already done, the leaves after them, and what the merge rule remembers.
    """
    clean = [number for number in folder.checkpoints() if number < exposure]
    if not clean:
        return 0, dict(fresh), {}
    saved = folder.load_checkpoint(clean[-1])
    parts: dict[str, dict[str, Tensor]] = {"leaf": {}, "memory": {}}
    for name, value in saved.tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return saved.round, parts["leaf"], parts["memory"]


def retrain(
    config: RunConfig,
    edge: NanoEdge,
    llm: LanguageModel,
    data: Mapping[str, ClientData],
    rounds: Mapping[int, list[str]],
    start: tuple[int, dict[str, Tensor], dict[str, Tensor]],
    *,
    stop: Callable[[], bool],
    forgotten: Mapping[str, Sequence[Forgotten]] | None = None,
) -> Iterator[Retrained]:
    """Train the rounds after the starting point again, with the clients that took part in them.

    Args:
        config: the run's settings.
        edge: NanoEdge of the run.
        llm: the language model.
        data: client to its samples without the forgotten ones; a client that has none left is missing.
        rounds: round to the clients that took part, see `participants`.
        start: from `starting_point`.
        stop: asked before each client.
        forgotten: client to what it has forgotten and keeps forgotten, as in a run that goes on after a job.

    Raises:
        ConfigError: the run's merge rule needs more of clients than leaves and Fishers.
        Interrupted: ``stop`` said so.
        TrainingDiverged: a loss stopped being finite.
    """
    rule = _rule(config)
    done, leaves, memory = start
    spec = spec_of(edge, config)
    for number in range(done + 1, config.rounds + 1):
        advice = rule.client_config(number)
        state = rule.init(spec, current=leaves, memory=memory, round=number)
        losses, seconds, count = [], 0.0, 0
        for client in rounds.get(number, sorted(data)):
            if stop():
                raise Interrupted(f"retraining was asked to end in round {number}.")
            if client not in data:
                continue
            edge.load_travelling(leaves)
            held = (forgotten or {}).get(client, ())
            guard = guard_of(edge, llm, held, config.guard_forgotten * config.participants(config.clients))
            torch.manual_seed(stream_seed(config.seed, "train", number, client))
            outcome = train_local(
                edge,
                llm,
                data[client],
                _settings(config, float(advice.get("proximal_mu", config.proximal_mu))),
                seed=config.seed,
                client=client,
                round_number=number,
                guard=guard,
            )
            fisher = None
            if advice.get("fisher"):
                chosen = draw(
                    len(data[client]),
                    min(config.fisher_samples, len(data[client])),
                    seed=stream_seed(config.seed, "fisher", number),
                    client=client,
                    start=0,
                )
                fisher = empirical_fisher(edge, llm, data[client], chosen, batch_size=config.batch_size)
            update = Update(
                client=client,
                round=number,
                weight=float(outcome.samples),
                leaves=edge.travelling(),
                fisher=fisher,
                spec=edge.spec(),
                basis=edge.basis_fingerprint(),
                metrics={"loss": outcome.loss, "steps": float(outcome.steps)},
            )
            validate(update, spec, round=number, needs_fisher=bool(advice.get("fisher")))
            state = rule.add(state, update)
            losses.append(outcome.loss)
            seconds += outcome.seconds
            count += outcome.steps
        if losses:
            leaves, memory = rule.finish(state), rule.memory(state)
        mean = sum(losses) / len(losses) if losses else float("nan")
        yield Retrained(number, leaves, mean, seconds, count, len(losses))


def _rule(config: RunConfig) -> Rule:
    config = settled(config)
    rule = create_rule(config.rule, **parse_settings(config.rule_options, "rule-options"))
    needs = sorted({key for number in (1, 2) for key in rule.client_config(number)} - _CAN)
    if needs or type(rule).downlink is not Rule.downlink:
        raise ConfigError(
            f"exact retraining inside a job works for merge rules that need leaves and Fishers only; {config.rule!r} "
            f"needs {', '.join(needs) or 'more on the way down'}. Start a new run without the samples instead."
        )
    return rule


def _settings(config: RunConfig, mu: float) -> TrainSettings:
    return TrainSettings(
        samples=config.samples,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        proximal_mu=mu,
        clip_norm=config.clip_norm,
    )
