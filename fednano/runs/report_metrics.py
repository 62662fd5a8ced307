"""Sorting ``metrics.jsonl`` for the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fednano.runs.progress import PLANES

__all__ = ["MAIN", "Client", "Metrics", "natural_key", "read_metrics"]

MAIN = "federated"


@dataclass(frozen=True)
class Client:
    """One client in the main phase.

    Attributes:
        name: its name.
        loss: training loss in its last round, or None.
        accuracy: of the final adapter on the samples it held out, or None.
        held_out: how many those are, or None.
        trained: training samples over all rounds.
        rounds: rounds it took part in.
        refused: rounds in which its update was refused.
        seconds: mean seconds of a round, or None.
    """

    name: str
    loss: float | None = None
    accuracy: float | None = None
    held_out: int | None = None
    trained: int = 0
    rounds: int = 0
    refused: int = 0
    seconds: float | None = None


@dataclass
class Metrics:
    """``metrics.jsonl``, sorted by what it is about. Phases are spelled with ``_``.

    Attributes:
        phases: phases in order of appearance.
        accuracy: phase -> round -> accuracy on the test set.
        test_loss: phase -> round -> loss on the test set.
        train_loss: phase -> round -> mean training loss over clients.
        spread: phase -> round -> (lowest, highest) training loss of a client.
        planes: phase -> plane -> bytes over all rounds.
        rounds: phase -> rounds that have a record.
        clients: the clients of the main phase, by name.
        refused: (phase, round, client, reason) of each refused update.
        client_rounds: client of the main phase -> round -> training loss, None where its update was refused.
        round_planes: phase -> round -> plane -> bytes.
        judged: phase -> test questions behind (a round's accuracy, the final accuracy), None where not told.
    """

    phases: list[str] = field(default_factory=list)
    accuracy: dict[str, dict[int, float]] = field(default_factory=dict)
    test_loss: dict[str, dict[int, float]] = field(default_factory=dict)
    train_loss: dict[str, dict[int, float]] = field(default_factory=dict)
    spread: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    planes: dict[str, dict[str, int]] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    clients: list[Client] = field(default_factory=list)
    refused: list[tuple[str, int, str, str]] = field(default_factory=list)
    client_rounds: dict[str, dict[int, float | None]] = field(default_factory=dict)
    round_planes: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)
    judged: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)

    @property
    def main(self) -> str | None:
        """The phase that the report is about: ``"federated"`` if there is one, else the first with rounds."""
        if MAIN in self.phases:
            return MAIN
        return next((phase for phase in self.phases if self.rounds.get(phase)), None)


def read_metrics(rows: list[dict[str, Any]]) -> Metrics:
    """Sort the records of ``metrics.jsonl``.

    A resumed run repeats the round it was killed in; of several records about the same thing the last one
    counts. Bytes are summed over clients, and taken from global records only for planes that no client record
    of the phase has, since a global record counts all clients together.

    Args:
        rows: records as ``RunFolder.metrics`` returns them.
    """
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        phase = str(row["phase"]).replace("-", "_")
        key = (phase, int(row["round"]), row["scope"], row.get("client"), bool(row.get("final")))
        latest.pop(key, None)
        latest[key] = {**row, "phase": phase}
    records = list(latest.values())
    found = Metrics()
    for row in records:
        phase, number = row["phase"], int(row["round"])
        if phase not in found.phases:
            found.phases.append(phase)
        found.rounds[phase] = max(found.rounds.get(phase, 0), number)
        if row["scope"] == "global":
            # the evaluation on the whole test set comes after the round's own and replaces it
            _keep(found.accuracy, phase, number, row.get("accuracy"))
            _keep(found.test_loss, phase, number, row.get("loss"))
            _keep(found.train_loss, phase, number, row.get("train_loss"))
            if row.get("accuracy") is not None and isinstance(row.get("samples"), int):
                each, whole = found.judged.get(phase, (None, None))
                found.judged[phase] = (each, row["samples"]) if row.get("final") else (row["samples"], whole)
        elif row.get("refused") is not None:
            found.refused.append((phase, number, str(row["client"]), str(row["refused"])))
    for phase, own in _grouped(records, "phase").items():
        _client_losses(found, phase, own)
        found.planes[phase] = _plane_totals(own)
        by_round = _grouped(own, "round").items()
        found.round_planes[phase] = {int(n): sent for n, part in by_round if (sent := _plane_totals(part))}
    own = [row for row in records if row["phase"] == found.main and row["scope"] == "client"]
    by_client = _grouped(own, "client")
    by_client = {name: by_client[name] for name in sorted(by_client, key=natural_key)}
    found.clients = _clients(by_client)
    for name, mine in by_client.items():
        losses = {
            int(row["round"]): float(row["loss"]) if isinstance(row.get("loss"), int | float) else None
            for row in mine
            if not row.get("final") and ("loss" in row or row.get("refused") is not None)
        }
        if losses:
            found.client_rounds[name] = losses
    return found


def _grouped(rows: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Rows by one of their values, as text, in order of appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), []).append(row)
    return groups


def _keep(table: dict[str, dict[int, float]], phase: str, number: int, value: Any) -> None:
    if isinstance(value, int | float) and math.isfinite(value):
        table.setdefault(phase, {})[number] = float(value)


def _client_losses(found: Metrics, phase: str, rows: list[dict[str, Any]]) -> None:
    by_round: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        if row["scope"] == "client" and not row.get("final") and isinstance(row.get("loss"), int | float):
            weight = row.get("samples") or 1
            by_round.setdefault(int(row["round"]), []).append((float(row["loss"]), float(weight)))
    for number, pairs in by_round.items():
        losses = [loss for loss, _ in pairs]
        found.spread.setdefault(phase, {})[number] = (min(losses), max(losses))
        if number not in found.train_loss.get(phase, {}):
            mean = math.fsum(loss * weight for loss, weight in pairs) / math.fsum(
                weight for _, weight in pairs
            )
            _keep(found.train_loss, phase, number, mean)


def _plane_totals(rows: list[dict[str, Any]]) -> dict[str, int]:
    totals: dict[str, dict[str, int]] = {"client": {}, "global": {}}
    for row in rows:
        for plane, count in (row.get("bytes") or {}).items():
            part = totals[row["scope"]]
            part[plane] = part.get(plane, 0) + int(count)
    merged = {**totals["global"], **totals["client"]}
    order = {plane: place for place, plane in enumerate(PLANES)}
    return dict(sorted(merged.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _clients(by_client: dict[str, list[dict[str, Any]]]) -> list[Client]:
    clients = []
    for name, own in by_client.items():
        final = [row for row in own if row.get("final")]
        training = [row for row in own if not row.get("final")]
        merged = [row for row in training if row.get("refused") is None]
        seconds = [float(row["seconds"]) for row in merged if isinstance(row.get("seconds"), int | float)]
        losses = [float(row["loss"]) for row in merged if isinstance(row.get("loss"), int | float)]
        scored = [row for row in final or training if isinstance(row.get("accuracy"), int | float)]
        clients.append(
            Client(
                name=name,
                loss=losses[-1] if losses else None,
                accuracy=float(scored[-1]["accuracy"]) if scored else None,
                held_out=int(scored[-1]["samples"])
                if scored and final and scored[-1].get("samples")
                else None,
                trained=sum(int(row.get("samples") or 0) for row in merged),
                rounds=len(merged),
                refused=len(training) - len(merged),
                seconds=math.fsum(seconds) / len(seconds) if seconds else None,
            )
        )
    return clients


def natural_key(name: str) -> tuple[str, int, str]:
    """Sort key: ``client-2`` before ``client-10``."""
    head = name.rstrip("0123456789")
    tail = name[len(head) :]
    return head, int(tail) if tail.isascii() and tail else -1, name
