"""Training without merging: the baselines in which every client is alone, or one holds everybody's data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from fednano.errors import RunError
from fednano.federation.asking import ask, sample_clients
from fednano.federation.config import Scalar
from fednano.federation.exchange import Delivery
from fednano.federation.ledger import failure_of, mean_loss, record_client, round_record
from fednano.federation.messages import Instruction
from fednano.federation.phase import Federation, Leaves, PhaseResult, WireTotals
from fednano.federation.schedules import learning_rate_at
from fednano.federation.watching import judge_round

__all__ = ["run_pooled", "run_separate"]


def run_separate(fed: Federation, phase: str, start: Leaves) -> dict[str, PhaseResult]:
    """The local-only baseline: every client trains on, alone, in the rounds that draw it; nothing is merged."""
    results = {client: PhaseResult(start) for client in sorted(fed.nodes)}
    for number in range(1, fed.config.rounds + 1):
        began = time.monotonic()
        chosen = sample_clients(fed.config, list(results), number)
        fed.view.round_started(number, chosen)
        wire = WireTotals()
        leaves = {client: results[client].leaves for client in chosen}
        losses = []
        for delivery in _train(fed, phase, number, leaves, wire):
            reason = failure_of(delivery)
            if reason is None and delivery.reply.leaves is not None:
                result = results[delivery.client]
                result.leaves, result.rounds = delivery.reply.leaves, number
                result.loss = delivery.reply.metrics["loss"]
                losses.append((delivery.client, delivery.reply.metrics["loss"], 1.0))
            record_client(fed, phase, number, delivery, reason)
        seconds = time.monotonic() - began
        fed.view.round_done(number, loss=mean_loss(losses), seconds=seconds, bytes=wire.planes())
    return results


def run_pooled(fed: Federation, phase: str, start: Leaves) -> PhaseResult:
    """The centralised baseline: one client with all data, and as many samples as a round's clients together."""
    result = PhaseResult(start)
    actor = min(fed.nodes)
    for number in range(1, fed.config.rounds + 1):
        began = time.monotonic()
        fed.view.round_started(number, ["pool"])
        wire = WireTotals()
        for delivery in _train(fed, phase, number, {actor: result.leaves}, wire, pool=True):
            reason = failure_of(delivery)
            if reason is not None or delivery.reply.leaves is None:
                raise RunError(f"the centralised baseline failed in round {number}: {reason}")
            result.leaves, result.loss = delivery.reply.leaves, delivery.reply.metrics["loss"]
            record_client(fed, phase, number, delivery, reason)
        result.rounds = number
        result.wire.add(wire)
        record = round_record(fed, phase, number, result, wire, time.monotonic() - began)
        judge_round(fed, phase, number, result, record)
    return result


def _train(
    fed: Federation,
    phase: str,
    number: int,
    leaves: Mapping[str, Leaves],
    wire: WireTotals,
    *,
    pool: bool = False,
) -> Iterator[Delivery]:
    """Plain training from plain leaves: what is not merged needs no codec, and of advice the learning rate at most."""
    advice: dict[str, Scalar] = {}
    if fed.config.lr_schedule != "constant":
        advice["learning_rate"] = learning_rate_at(fed.config, number)
    instructions = {
        client: Instruction(
            *(fed.config, phase, number, fed.ticket, pool, advice, own), basis=fed.basis, run=fed.folder.id
        )
        for client, own in leaves.items()
    }
    return ask(fed, phase, number, instructions, wire)
