"""Ask clients to train: who is asked, what is said, what travels down; and read their updates."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, RecordDict

from fednano.aggregation import Refusal, Rule, Spec, Update, freshen, validate
from fednano.federation.config import RunConfig, Scalar
from fednano.federation.exchange import Again, Delivery, Outstanding, exchange
from fednano.federation.faults import parse_faults
from fednano.federation.messages import Instruction, record_bytes
from fednano.federation.misbehaviour import assign
from fednano.federation.phase import Federation, Leaves, PhaseResult, WireTotals, sent_beside
from fednano.federation.schedules import learning_rate_at
from fednano.federation.specification import fingerprints, ranks_of
from fednano.federation.uplink import codec_advice, codec_asked, unpack_fisher, unpack_update
from fednano.training.seeds import generator

__all__ = [
    "advise",
    "ask",
    "descending",
    "instruct",
    "read_update",
    "sample_clients",
    "take_in",
]


def sample_clients(
    config: RunConfig, names: Sequence[str], round_number: int, spare: float = 0.0
) -> list[str]:
    """The clients that take part in a round: drawn without replacement, by seed and round alone.

    Args:
        config: share of the clients, and the seed.
        names: all clients.
        round_number: counted from 1.
        spare: share of further clients, on top of those that are needed.
    """
    ordered = sorted(names)
    count = config.participants(len(ordered))
    count = min(len(ordered), count + math.ceil(count * spare))
    if count == len(ordered):
        return ordered
    chosen = generator(config.seed, "clients", round_number).choice(len(ordered), size=count, replace=False)
    return [ordered[int(index)] for index in sorted(chosen)]


def advise(rule: Rule, spec: Spec, config: RunConfig, number: int) -> dict[str, Scalar]:
    """What clients are told of a rule in one round: factors by the names of their leaves, and the codec."""
    advice: dict[str, Scalar] = dict(rule.client_config(number))
    travelling = set(rule.travelling(spec, number))
    for key in {"frozen", "personal"} & set(advice):
        advice[key] = ",".join(name for name in spec.leaves if name not in travelling)
    if config.lr_schedule != "constant":
        advice["learning_rate"] = learning_rate_at(config, number)
    return advice | codec_advice(config, number)


def descending(fed: Federation, rule: Rule, number: int, leaves: Leaves) -> Leaves:
    """The leaves that clients must be sent: not their own personal ones, nor frozen ones that the seed gives them."""
    travelling = set(rule.travelling(fed.spec, number))
    personal = "personal" in rule.client_config(number)

    def needed(name: str, leaf: torch.Tensor) -> bool:
        known = fed.seeded.get(name)
        return name in travelling or not (personal or (known is not None and torch.equal(known, leaf)))

    return {name: leaf for name, leaf in leaves.items() if needed(name, leaf)}


def instruct(
    fed: Federation, phase: str, rule: Rule, number: int, result: PhaseResult, clients: Collection[str]
) -> dict[str, Instruction]:
    """What each client is told in a round."""
    ranks = ranks_of(fed.config, fed.spec, fed.nodes)
    base = Instruction(
        *(fed.config, phase, number, fed.ticket, False),
        advice=advise(rule, fed.spec, fed.config, number),
        leaves=descending(fed, rule, number, result.leaves),
        basis=fed.basis,
        run=fed.folder.id,
        extra=sent_beside(rule, fed.spec, result.memory),
    )
    told = {client: replace(base, accepted=result.accepted.get(client, 0)) for client in clients}
    for client in told if ranks else ():
        own = rule.for_client(result.leaves, fed.spec, ranks=ranks[client])
        told[client] = replace(told[client], leaves=descending(fed, rule, number, own))
    faults = assign(
        parse_faults(fed.config.faults), list(fed.nodes), seed=fed.config.seed, round_number=number
    )
    for client in faults.keys() & told.keys():
        told[client] = replace(told[client], advice={**told[client].advice, "fault": faults[client]})
    return told


def ask(
    fed: Federation,
    phase: str,
    number: int,
    instructions: Mapping[str, Instruction],
    wire: WireTotals,
    outstanding: Outstanding | None = None,
) -> Generator[Delivery]:
    """Send training requests and yield what comes back as it comes, counting bytes both ways.

    A client whose node or process dies meanwhile is asked again when it is back (`Again`): the same request of the same
    round, which it carries out from the state that it had before the round.

    Args:
        fed: the federation.
        phase: the phase.
        number: the round.
        instructions: client name to what it is asked.
        wire: counts.
        outstanding: requests of earlier rounds whose replies are taken, too; and where this round's are left.
    """
    shared: dict[int, ArrayRecord] = {}

    def request(client: str) -> RecordDict:
        content = instructions[client].to_records(shared)
        wire.requests += 1
        parts = {name: content[name] for name in ("leaves", "extra") if name in content}
        wire.adapter_down += record_bytes(RecordDict(parts))
        return content

    def tell(client: str, why: str) -> None:
        text = f"{phase}, round {number}, {client}: {why}; asked again."
        fed.view.message(text, "warning")
        fed.folder.append_event("warning", text)
        told = {"run": fed.folder.id, "phase": phase, "round": number, "site": client}
        fed.auditor.record("asked again", **told, reason=why)

    requests = {client: (fed.nodes[client], request(client)) for client in instructions}
    deliveries = exchange(
        fed.grid,
        requests,
        message_type="train",
        group=f"{phase}-{number}",
        timeout=fed.config.round_timeout,
        stop=fed.stop,
        number=number,
        outstanding=outstanding,
        again=Again(request, fed.config.rejoin_timeout, tell),
    )
    del requests
    try:
        for delivery in deliveries:
            if delivery.reply.leaves is not None:
                wire.add_reply(delivery)
            yield delivery
    finally:
        deliveries.close()


def read_update(fed: Federation, rule: Rule, delivery: Delivery, started_from: Leaves) -> Update:
    """A reply as an update of the round it was asked for, decoded and checked.

    Raises:
        Refusal: with the reason.
    """
    reply, asked = delivery.reply, delivery.asked
    assert reply.leaves is not None
    if fed.edge and reply.facts.get("edge") != fed.edge:
        got = reply.facts.get("edge", "none")
        raise Refusal(
            "basis", f"trained on edge weights {got[:16]}, this run has {fed.edge[:16]}", delivery.client
        )
    names = rule.travelling(fed.spec, asked)
    leaves, fisher, spec = reply.leaves, reply.fisher, fed.spec
    ranks = ranks_of(fed.config, spec, fed.nodes).get(delivery.client)
    if ranks and fed.nano is not None:
        started_from = rule.for_client(started_from, spec, ranks=ranks)
        wanted, basis = fingerprints(fed.nano, started_from)
        spec = replace(spec, spec=wanted, basis=basis)
    codec = codec_asked(advise(rule, fed.spec, fed.config, asked))
    if codec is not None:
        try:
            leaves = unpack_update(codec, leaves, started_from, names)
            fisher = None if fisher is None else unpack_fisher(fisher, started_from, names)
        except Refusal as error:
            raise Refusal(error.reason, str(error), delivery.client) from error
    metrics = {
        "loss": reply.metrics.get("initial-loss", reply.metrics.get("loss", math.nan)),
        "steps": reply.metrics.get("steps", 0.0),
    }
    if "learning-rate" in reply.metrics:
        metrics["lr"] = reply.metrics["learning-rate"]
    update = Update(
        client=delivery.client,
        round=reply.round,
        weight=reply.metrics["samples"],
        leaves=leaves,
        fisher=fisher,
        spec=reply.facts.get("spec", ""),
        basis=reply.facts.get("basis", ""),
        metrics=metrics,
    )
    needs_fisher = bool(rule.client_config(asked).get("fisher"))
    validate(update, spec, round=asked, names=names, ranks=ranks, needs_fisher=needs_fisher)
    return update


def take_in(
    fed: Federation,
    rule: Rule,
    delivery: Delivery,
    number: int,
    current: Leaves,
    started_from: Mapping[int, Leaves],
) -> Update:
    """The update that a reply of this round or, where late ones are buffered, of an earlier round contributes.

    Raises:
        Refusal: with the reason.
    """
    asked = delivery.asked
    if asked == number:
        return read_update(fed, rule, delivery, current)
    if fed.config.late == "drop" or asked not in started_from:
        raise Refusal("round", f"asked for in round {asked}, came in round {number}: late", delivery.client)
    update = read_update(fed, rule, delivery, started_from[asked])
    return freshen(update, started_from[asked], current, number, fed.config.staleness)
