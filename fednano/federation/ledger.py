"""Write down what a round did: a checkpoint, a line for each client, a line for the round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from fednano.errors import HostUnavailable, RunError
from fednano.federation.exchange import Delivery
from fednano.federation.phase import MAIN_PHASE, Federation, PhaseResult, WireTotals

__all__ = ["failure_of", "give_up", "mean_loss", "record_client", "round_record", "save_round"]


def failure_of(delivery: Delivery) -> str | None:
    """Why a reply to a training request cannot be an update; ``None`` when it can."""
    reply = delivery.reply
    if reply.failure is not None:
        return f"{reply.failure.kind}: {reply.failure.message}"
    if reply.leaves is None:
        return "the reply carries no adapter leaves"
    if "samples" not in reply.metrics:
        return "the reply lacks its number of samples"
    return None


def mean_loss(losses: list[tuple[str, float, float]]) -> float | None:
    """Weighted by samples and summed in the order of names, so that it has the same bits in every run."""
    if not losses:
        return None
    total = sum(weight for _, _, weight in losses)
    return sum(loss * weight for _, loss, weight in sorted(losses)) / total


def record_client(fed: Federation, phase: str, number: int, delivery: Delivery, reason: str | None) -> None:
    """One line on a client's reply: what it reached, or why it was refused."""
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
    if delivery.asked != number:
        record["trained_for"] = delivery.asked
    if delivery.repeats:
        record["asked_again"] = delivery.repeats
    if reason is None:
        # Neither is there under secure aggregation, no loss where samples are private.
        for name in ("loss", "epsilon", "guarded", "guard-loss"):
            if name in metrics:
                record[name.replace("-", "_")] = metrics[name]
        if "samples" in metrics:
            record["samples"] = int(metrics["samples"])
        record["encoded"] = int(metrics.get("encoded", 0))
        if metrics.get("start"):
            record["start_seconds"] = metrics["start"]
    else:
        record["refused"] = reason
        fed.folder.append_event("warning", f"{phase}, round {number}, {delivery.client}: {reason}")
    fed.folder.append_metrics(record)
    told = {"run": fed.folder.id, "phase": phase, "round": number, "site": delivery.client}
    if reason is None:
        known = {"samples": record["samples"]} if "samples" in record else {}
        fed.auditor.record("update accepted", **told, **known)
    else:
        fed.auditor.record("update refused", **told, reason=reason[:500])
    fed.view.client_done(
        delivery.client,
        loss=metrics.get("loss") if reason is None else None,
        samples=int(metrics["samples"]) if reason is None and "samples" in metrics else None,
        seconds=delivery.seconds,
        bytes=planes,
        refused=reason,
    )


def save_round(fed: Federation, phase: str, number: int, result: PhaseResult) -> None:
    """The checkpoint of a round: everything that resuming needs of the server."""
    state = {
        "phase": phase,
        "round": number,
        "wire": vars(result.wire),
        "loss": result.loss,
        "accepted": result.accepted,
        "tombstones": max(0, result.epoch),
    }
    tensors = {f"leaf.{name}": leaf for name, leaf in result.leaves.items()}
    tensors |= {f"memory.{name}": leaf for name, leaf in result.memory.items()}
    fed.folder.save_checkpoint(
        number,
        tensors,
        state,
        keep_last=fed.config.rounds,  # a few kilobytes each; unlearning starts from the one before first exposure
        phase=None if phase == MAIN_PHASE else phase,
    )


def round_record(
    fed: Federation, phase: str, number: int, result: PhaseResult, wire: WireTotals, seconds: float
) -> dict[str, object]:
    """Show that a round is done; returns what its line in the metrics says so far."""
    record: dict[str, object] = {
        "phase": phase,
        "round": number,
        "scope": "global",
        "seconds": seconds,
        "bytes": wire.planes(),
    }
    if result.loss is not None:
        record["train_loss"] = result.loss
    fed.view.round_done(number, loss=result.loss, seconds=seconds, bytes=wire.planes())
    return record


def give_up(number: int, failures: Mapping[str, str]) -> NoReturn:
    """End a run that cannot make progress, with the reason that the clients gave."""
    client, reason = min(failures.items())
    if reason.startswith("HostUnavailable"):
        raise HostUnavailable(
            f"no client reached the language host in round {number}. {client} says: {reason}"
        )
    raise RunError(f"no client delivered a valid update in round {number}. {client} says: {reason}")
