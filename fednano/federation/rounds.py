"""The round loop: pick clients, send leaves, merge what comes back, check it in, judge it, write it down."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fednano.aggregation import Rule, Spec, Update, validate
from fednano.errors import HostUnavailable, RunError, UpdateRefused
from fednano.federation.config import RunConfig, Scalar
from fednano.federation.evaluator import Evaluator
from fednano.federation.exchange import Delivery, Stop, exchange
from fednano.federation.messages import HostTicket, Instruction, record_bytes
from fednano.runs import RunFolder, RunView
from fednano.training.seeds import generator

__all__ = [
    "MAIN_PHASE",
    "Federation",
    "Leaves",
    "PhaseResult",
    "WireTotals",
    "run_pooled",
    "run_rounds",
    "run_separate",
]

Leaves = dict[str, Tensor]

MAIN_PHASE = "federated"
"""The phase that the run exists for; its checkpoints stand directly in the run folder."""


@dataclass
class WireTotals:
    """Bytes counted over one phase.

    Attributes:
        updates: replies that carried an update.
        adapter_up: bytes of their updates, as Flower serialised them.
        requests: training requests sent.
        adapter_down: bytes of the leaves in them.
        samples: samples of all training steps.
        activation_up: bytes sent to the language host in these steps.
        activation_down: bytes that came back.
    """

    updates: int = 0
    adapter_up: int = 0
    requests: int = 0
    adapter_down: int = 0
    samples: int = 0
    activation_up: int = 0
    activation_down: int = 0

    def add_reply(self, delivery: Delivery) -> None:
        """Count one reply."""
        metrics = delivery.reply.metrics
        self.updates += 1
        self.adapter_up += delivery.leaves_bytes
        self.samples += int(metrics.get("step-samples", 0))
        self.activation_up += int(metrics.get("step-sent", 0))
        self.activation_down += int(metrics.get("step-received", 0))


@dataclass(frozen=True)
class Federation:
    """What every phase of a run works with.

    Attributes:
        grid: Flower's connection to the clients.
        nodes: client name to node id.
        config: the run's settings.
        ticket: how clients reach the language host.
        spec: what an update must look like.
        folder: where everything is written.
        view: what the user sees.
        stop: a request to end early.
        evaluator: judges adapters on the test set.
        simulated: whether the clients hold parts of one data set, instead of data of their own.
        basis: fingerprint of the adapters' basis, where one was shipped.
    """

    grid: Grid
    nodes: Mapping[str, int]
    config: RunConfig
    ticket: HostTicket
    spec: Spec
    folder: RunFolder
    view: RunView
    stop: Stop
    evaluator: Evaluator
    simulated: bool
    basis: str = ""


@dataclass
class PhaseResult:
    """How a phase ended.

    Attributes:
        leaves: the merged adapters.
        wire: bytes counted.
        loss: mean training loss of the last round.
        rounds: rounds that were completed.
        memory: what the merge rule carries from round to round.
    """

    leaves: Leaves
    wire: WireTotals = field(default_factory=WireTotals)
    loss: float | None = None
    rounds: int = 0
    memory: Leaves = field(default_factory=dict)


def sample_clients(config: RunConfig, names: Sequence[str], round_number: int) -> list[str]:
    """The clients that take part in a round: drawn without replacement, by seed and round alone."""
    ordered = sorted(names)
    count = max(1, round(config.fraction * len(ordered)))
    if count == len(ordered):
        return ordered
    chosen = generator(config.seed, "clients", round_number).choice(len(ordered), size=count, replace=False)
    return [ordered[int(index)] for index in sorted(chosen)]


def run_rounds(fed: Federation, phase: str, rule: Rule, start: PhaseResult) -> PhaseResult:
    """Federated training: the rounds after ``start.rounds`` up to ``config.rounds``.

    A round with fewer valid updates than ``min-replies`` keeps its starting leaves. After each round a checkpoint is
    written before anything else happens.

    Raises:
        RunError: every client fails for the same reason two rounds running, so going on is pointless.
        Interrupted: the run was asked to end.
    """
    result, first, barren = start, start.rounds + 1, 0
    for number in range(first, fed.config.rounds + 1):
        chosen = sample_clients(fed.config, list(fed.nodes), number)
        advice = rule.client_config(number)
        state = rule.init(fed.spec, current=result.leaves, memory=result.memory, round=number)
        failures: dict[str, str] = {}
        losses: list[tuple[str, float, float]] = []
        began = time.monotonic()
        fed.view.round_started(number, chosen)
        wire = WireTotals()
        leaves = dict.fromkeys(chosen, result.leaves)
        for delivery in _train(fed, phase, number, leaves, wire, advice):
            reason = _failure(delivery)
            if reason is None:
                try:
                    update = _update(delivery)
                    validate(update, fed.spec, round=number, needs_fisher=bool(advice.get("fisher")))
                    state = rule.add(state, update)
                except UpdateRefused as error:
                    reason = str(error)
                    if getattr(error, "reason", "") == "norm":
                        reason += ". Lower the learning rate, or raise max-abs."
            if reason is None:
                losses.append((delivery.client, delivery.reply.metrics["loss"], update.weight))
            else:
                failures[delivery.client] = reason
            _record_client(fed, phase, number, delivery, reason)
        merged = len(losses)
        if merged >= fed.config.min_replies:
            result.leaves = rule.finish(state)
            result.memory = rule.memory(state)
        elif merged:
            fed.view.message(
                f"round {number}: {merged} valid updates, fewer than min-replies {fed.config.min_replies}; "
                "the adapters stay as they were.",
                "warning",
            )
        barren = 0 if merged else barren + 1
        result.loss = _mean_loss(losses)
        result.rounds = number
        _accumulate(result.wire, wire)
        _finish_round(fed, phase, number, result, wire, time.monotonic() - began)
        unreachable = bool(failures) and all(text.startswith("HostUnavailable") for text in failures.values())
        if not merged and (barren >= 2 or number == first or unreachable):
            _give_up(number, failures)
    return result


def run_separate(fed: Federation, phase: str, start: Leaves) -> dict[str, PhaseResult]:
    """The local-only baseline: every client trains on, alone, for as many rounds; nothing is merged."""
    results = {client: PhaseResult(start) for client in sorted(fed.nodes)}
    for number in range(1, fed.config.rounds + 1):
        began = time.monotonic()
        fed.view.round_started(number, list(results))
        wire = WireTotals()
        leaves = {client: result.leaves for client, result in results.items()}
        losses = []
        for delivery in _train(fed, phase, number, leaves, wire, {}):
            reason = _failure(delivery)
            if reason is None and delivery.reply.leaves is not None:
                result = results[delivery.client]
                result.leaves, result.rounds = delivery.reply.leaves, number
                result.loss = delivery.reply.metrics["loss"]
                losses.append((delivery.client, delivery.reply.metrics["loss"], 1.0))
            _record_client(fed, phase, number, delivery, reason)
        seconds = time.monotonic() - began
        fed.view.round_done(number, loss=_mean_loss(losses), seconds=seconds, bytes=_planes(wire))
    return results


def run_pooled(fed: Federation, phase: str, start: Leaves) -> PhaseResult:
    """The centralised baseline: one client holds all data and sees as many samples as all clients together."""
    result = PhaseResult(start)
    actor = min(fed.nodes)
    for number in range(1, fed.config.rounds + 1):
        began = time.monotonic()
        fed.view.round_started(number, ["pool"])
        wire = WireTotals()
        for delivery in _train(fed, phase, number, {actor: result.leaves}, wire, {}, pool=True):
            reason = _failure(delivery)
            if reason is not None or delivery.reply.leaves is None:
                raise RunError(f"the centralised baseline failed in round {number}: {reason}")
            result.leaves, result.loss = delivery.reply.leaves, delivery.reply.metrics["loss"]
            _record_client(fed, phase, number, delivery, reason)
        result.rounds = number
        _accumulate(result.wire, wire)
        _finish_round(fed, phase, number, result, wire, time.monotonic() - began, checkpoint=False)
    return result


def _train(
    fed: Federation,
    phase: str,
    number: int,
    leaves: Mapping[str, Leaves],
    wire: WireTotals,
    advice: Mapping[str, Scalar],
    *,
    pool: bool = False,
) -> Iterator[Delivery]:
    requests = {}
    for client, own in leaves.items():
        instruction = Instruction(fed.config, phase, number, fed.ticket, pool, dict(advice), own, fed.basis)
        content = instruction.to_records()
        requests[client] = (fed.nodes[client], content)
        wire.requests += 1
        wire.adapter_down += record_bytes(RecordDict({"leaves": content["leaves"]}))
    deliveries = exchange(
        fed.grid,
        requests,
        message_type="train",
        group=f"{phase}-{number}",
        timeout=fed.config.round_timeout,
        stop=fed.stop,
    )
    for delivery in deliveries:
        if delivery.reply.leaves is not None:
            wire.add_reply(delivery)
        yield delivery


def _failure(delivery: Delivery) -> str | None:
    reply = delivery.reply
    if reply.failure is not None:
        return f"{reply.failure.kind}: {reply.failure.message}"
    if reply.leaves is None:
        return "the reply carries no adapter leaves"
    if "loss" not in reply.metrics or "samples" not in reply.metrics:
        return "the reply lacks its loss or its number of samples"
    return None


def _update(delivery: Delivery) -> Update:
    reply = delivery.reply
    assert reply.leaves is not None
    return Update(
        client=delivery.client,
        round=reply.round,
        weight=reply.metrics["samples"],
        leaves=reply.leaves,
        fisher=reply.fisher,
        spec=reply.facts.get("spec", ""),
        basis=reply.facts.get("basis", ""),
        metrics={"loss": reply.metrics["loss"], "steps": reply.metrics.get("steps", 0.0)},
    )


def _mean_loss(losses: list[tuple[str, float, float]]) -> float | None:
    """Weighted by samples and summed in the order of names, so that it has the same bits in every run."""
    if not losses:
        return None
    total = sum(weight for _, _, weight in losses)
    return sum(loss * weight for _, loss, weight in sorted(losses)) / total


def _record_client(fed: Federation, phase: str, number: int, delivery: Delivery, reason: str | None) -> None:
    metrics = delivery.reply.metrics
    planes = {
        "adapter_up": delivery.leaves_bytes,
        "activation_up": int(metrics.get("step-sent", 0)),
        "activation_down": int(metrics.get("step-received", 0)),
    }
    record: dict[str, object] = {
        "phase": phase,
        "round": number,
        "scope": "client",
        "client": delivery.client,
        "seconds": delivery.seconds,
        "bytes": planes,
    }
    if reason is None:
        record |= {"loss": metrics["loss"], "samples": int(metrics["samples"])}
        record["encoded"] = int(metrics.get("encoded", 0))
    else:
        record["refused"] = reason
        fed.folder.append_event("warning", f"{phase}, round {number}, {delivery.client}: {reason}")
    fed.folder.append_metrics(record)
    fed.view.client_done(
        delivery.client,
        loss=metrics.get("loss") if reason is None else None,
        samples=int(metrics["samples"]) if reason is None else None,
        seconds=delivery.seconds,
        bytes=planes,
        refused=reason,
    )


def _planes(wire: WireTotals) -> dict[str, int]:
    return {
        "adapter_up": wire.adapter_up,
        "adapter_down": wire.adapter_down,
        "activation_up": wire.activation_up,
        "activation_down": wire.activation_down,
    }


def _accumulate(total: WireTotals, wire: WireTotals) -> None:
    for name, value in vars(wire).items():
        setattr(total, name, getattr(total, name) + value)


def _finish_round(
    fed: Federation,
    phase: str,
    number: int,
    result: PhaseResult,
    wire: WireTotals,
    seconds: float,
    *,
    checkpoint: bool = True,
) -> None:
    if checkpoint:
        state = {"phase": phase, "round": number, "wire": vars(result.wire), "loss": result.loss}
        tensors = {f"leaf.{name}": leaf for name, leaf in result.leaves.items()}
        tensors |= {f"memory.{name}": leaf for name, leaf in result.memory.items()}
        fed.folder.save_checkpoint(
            number,
            tensors,
            state,
            keep_last=fed.config.rounds,  # a few kilobytes each; unlearning starts from the one before first exposure
            phase=None if phase == MAIN_PHASE else phase,
        )
    record: dict[str, object] = {
        "phase": phase,
        "round": number,
        "scope": "global",
        "seconds": seconds,
        "bytes": _planes(wire),
    }
    if result.loss is not None:
        record["train_loss"] = result.loss
    fed.view.round_done(number, loss=result.loss, seconds=seconds, bytes=_planes(wire))
    every = fed.config.evaluate_every
    if every and number % every == 0:
        samples = fed.evaluator.samples(fed.config.evaluate_samples)
        judged = fed.evaluator.judge(result.leaves, samples)
        record |= {"accuracy": judged.accuracy, "loss": judged.loss, "samples": len(samples)}
        fed.view.evaluation(phase, number, accuracy=judged.accuracy, loss=judged.loss, samples=len(samples))
    fed.folder.append_metrics(record)


def _give_up(number: int, failures: Mapping[str, str]) -> None:
    """End a run that cannot make progress, with the reason that the clients gave."""
    client, reason = min(failures.items())
    if reason.startswith("HostUnavailable"):
        raise HostUnavailable(
            f"no client reached the language host in round {number}. {client} says: {reason}"
        )
    raise RunError(f"no client delivered a valid update in round {number}. {client} says: {reason}")
