"""What the page shows of a run, as plain JSON values, from the run's files."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fednano.board.logs import Tail, read_object
from fednano.errors import RunError
from fednano.runs.metrics import check_metrics
from fednano.runs.report_metrics import MAIN, Metrics, read_metrics

__all__ = ["FILES", "Watched"]

FILES = ("config.json", "metrics.jsonl", "events.jsonl", "summary.json", "report.html")
JOBS = "unlearning/jobs.sqlite"
_SILENT_S = 600.0
_EVENTS = 20


class Watched:
    """One run, read again when its files have changed.

    Args:
        path: the run folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = Tail(path / "metrics.jsonl")
        self._events = Tail(path / "events.jsonl")
        self._seen: tuple[Any, ...] | None = None
        self._found: dict[str, Any] = {}

    def signature(self) -> tuple[Any, ...]:
        """Sizes and times of the run's files: it changes when they do."""
        found: list[Any] = []
        for name in (*FILES, JOBS, f"{JOBS}-wal"):
            try:
                facts = (self.path / name).stat()
            except OSError:
                found.append(None)
            else:
                found.append((facts.st_size, facts.st_mtime_ns, facts.st_ino))
        return tuple(found)

    def details(self, signature: tuple[Any, ...] | None = None) -> dict[str, Any]:
        """Everything about the run. What is damaged is left out and named in ``problems``."""
        now = signature or self.signature()
        if now != self._seen:
            self._found, self._seen = self._read(), now
        return {**self._found, "status": self._status(now)}

    def _read(self) -> dict[str, Any]:
        problems: list[str] = []
        config = read_object(self.path / "config.json", problems)
        summary = read_object(self.path / "summary.json", problems)
        rows, odd = [], 0
        for row in self._metrics.read():
            try:
                check_metrics(row)
                _check_values(row)
            except (RunError, TypeError, ValueError):
                odd += 1
            else:
                rows.append(row)
        events = [row for row in self._events.read() if isinstance(row.get("text"), str)]
        problems += self._metrics.problems + self._events.problems
        if odd:
            problems.append(f"metrics.jsonl: {odd} records cannot be placed and are left out")
        metrics = read_metrics(rows)
        rounds = _rounds(metrics, rows)
        scores = {phase: _last(values) for phase, values in metrics.accuracy.items()}
        scores |= {
            str(phase): value
            for phase, value in _mapping(summary, "accuracy").items()
            if _number(value) is not None
        }
        total = config.get("rounds")
        return {
            "id": self.path.name,
            "created": _text(config, "created"),
            **{name: _text(config, name) for name in ("model", "dataset", "adapter", "rule", "command")},
            "seed": config.get("seed"),
            "ended": _text(summary, "status"),
            "total": total if isinstance(total, int) else None,
            "metric": _text(summary, "metric") or "accuracy",
            "scores": scores,
            "round": rounds[-1]["round"] if rounds else 0,
            "rounds": rounds,
            "planes": metrics.planes.get(MAIN, {}),
            "clients": [asdict(client) for client in metrics.clients],
            "refused": [
                {"round": number, "client": client, "reason": reason}
                for phase, number, client, reason in metrics.refused[-_EVENTS:]
            ],
            "events": [
                {key: _text(row, key) for key in ("time", "level", "text")} for row in events[-_EVENTS:]
            ],
            "jobs": _jobs(self.path, problems),
            "report": (self.path / "report.html").is_file(),
            "problems": problems,
        }

    def _status(self, signature: tuple[Any, ...]) -> str:
        """``complete``, ``interrupted``, ``stopped`` (it said why), ``running``, ``silent`` or ``waiting``."""
        if ended := self._found["ended"]:
            return str(ended)
        times = [facts[1] / 1e9 for facts in signature[:3] if facts is not None]
        if not times:
            return "waiting"
        last = self._found["events"][-1] if self._found["events"] else None
        if last and last["level"] == "error":
            metrics = signature[1]
            if metrics is None or metrics[1] / 1e9 <= _seconds(last["time"]) + 2:
                return "stopped"
        return "running" if datetime.now(UTC).timestamp() - max(times) < _SILENT_S else "silent"


def _rounds(metrics: Metrics, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds of the main phase, ascending, with what is known of each."""
    merges = [row for row in rows if row["scope"] == "global" and row["phase"].replace("-", "_") == MAIN]
    seconds = {row["round"]: row["seconds"] for row in merges if row.get("seconds") is not None}
    members: dict[int, int] = {}
    for losses in metrics.client_rounds.values():
        for number in losses:
            members[number] = members.get(number, 0) + 1
    refused: dict[int, int] = {}
    for phase, number, _, _ in metrics.refused:
        if phase == MAIN:
            refused[number] = refused.get(number, 0) + 1
    accuracy, train = metrics.accuracy.get(MAIN, {}), metrics.train_loss.get(MAIN, {})
    sent = metrics.round_planes.get(MAIN, {})
    found = []
    for number in sorted({*seconds, *members, *accuracy, *train, *sent} - {0}):
        low, high = metrics.spread.get(MAIN, {}).get(number, (None, None))
        found.append(
            {
                "round": number,
                "score": accuracy.get(number),
                "loss": train.get(number),
                "low": low,
                "high": high,
                "seconds": seconds.get(number),
                "clients": members.get(number, 0),
                "refused": refused.get(number, 0),
                "bytes": sent.get(number, {}),
            }
        )
    return found


def _jobs(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The run's unlearning jobs, newest first."""
    file = path / JOBS
    if not file.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=2)) as database:
            database.row_factory = sqlite3.Row
            rows = database.execute(
                "SELECT id, site, state, created, updated, note FROM jobs ORDER BY id DESC LIMIT 100"
            )
            return [dict(row) for row in rows.fetchall()]
    except sqlite3.Error as error:
        problems.append(f"{JOBS} cannot be read: {error}")
        return []


def _check_values(row: dict[str, Any]) -> None:
    """Raise unless bytes are counts and numbers are numbers, which a damaged line need not hold."""
    sizes = row.get("bytes")
    if sizes is not None and not all(
        _number(count) is not None for count in sizes.items() and sizes.values()
    ):
        raise ValueError("bytes")
    for key in ("loss", "accuracy", "train_loss", "seconds", "samples"):
        if row.get(key) is not None and _number(row[key]) is None:
            raise ValueError(key)


def _number(value: object) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good and isinstance(value, int | float) else None


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _last(values: dict[int, float]) -> float:
    return values[max(values)]


def _seconds(stamp: str) -> float:
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return 0.0
