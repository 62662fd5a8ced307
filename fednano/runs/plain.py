"""Views without a terminal: one line an event, or warnings only."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fednano.runs.progress import RunInfo
from fednano.runs.text import format_bytes, format_percent, format_seconds, phase_title

if TYPE_CHECKING:
    from fednano.runs.summary import Summary

__all__ = ["PlainView", "QuietView"]


class PlainView:
    """One line for each event.

    Args:
        stream: where to write; standard output by default.
        clock: seconds, for the elapsed time at the start of each line.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._begin = clock()
        self._lock = threading.RLock()
        self._phase = ""
        self._rounds = 0
        self._round = 0
        self._finished = False

    def _line(self, text: str) -> None:
        with self._lock:
            stream = self._stream or sys.stdout
            # A log is read by line: text from outside must not be able to start one.
            safe = "".join(c if c.isprintable() else " " for c in text)
            encoding = getattr(stream, "encoding", None) or "utf-8"
            safe = safe.encode(encoding, "replace").decode(encoding)
            stream.write(f"[{format_seconds(self._clock() - self._begin):>8}] {safe}\n")
            stream.flush()

    def start(self, info: RunInfo) -> None:
        """Write the run's name and setting."""
        self._begin = self._clock()
        self._line(
            f"run {info.run_id}: model {info.model}, data {info.dataset}, adapter {info.adapter}, rule "
            f"{info.rule}, "
            f"{info.clients} clients, seed {info.seed}, folder {info.path}"
        )

    def phase_started(self, phase: str, rounds: int) -> None:
        """Write the phase's name."""
        self._phase, self._rounds, self._round = phase, rounds, 0
        self._line(f"phase {phase_title(phase)}" + (f": {rounds} rounds" if rounds else ""))

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        """Write the round and its clients."""
        self._round = number
        self._line(f"round {number}/{self._rounds} started with clients {', '.join(clients)}")

    def client_done(
        self,
        client: str,
        *,
        loss: float | None = None,
        accuracy: float | None = None,
        samples: int | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002
        refused: str | None = None,
    ) -> None:
        """Write the client's numbers, or why its update was refused."""
        if refused is not None:
            self._line(f"warning: round {self._round}, client {client}: update refused: {refused}")
            return
        parts = _numbers(loss=loss, accuracy=accuracy, samples=samples, seconds=seconds, sizes=bytes)
        self._line(f"round {self._round}/{self._rounds}, client {client} done" + parts)

    def round_done(
        self,
        number: int,
        *,
        loss: float | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002
    ) -> None:
        """Write the round's numbers."""
        self._line(
            f"round {number}/{self._rounds} merged" + _numbers(loss=loss, seconds=seconds, sizes=bytes)
        )

    def evaluation(
        self,
        phase: str,
        number: int,
        *,
        accuracy: float,
        loss: float | None = None,
        samples: int | None = None,
        metric: str = "accuracy",
    ) -> None:
        """Write the accuracy."""
        where = f"{phase_title(phase)}, round {number}" if number else phase_title(phase)
        self._line(
            f"evaluation ({where})" + _numbers(loss=loss, accuracy=accuracy, samples=samples, metric=metric)
        )

    def message(self, text: str, level: str = "info") -> None:
        """Write the text, with its level unless that is ``"info"``."""
        self._line(text if level == "info" else f"{level}: {text}")

    def finish(
        self, summary: Summary | None = None, *, report: Path | None = None, error: str | None = None
    ) -> None:
        """Write the final table, or the error."""
        if self._finished:
            return
        self._finished = True
        if error is not None:
            self._line(f"error: {error}")
        if summary is not None:
            from fednano.runs.table import print_final_table

            with self._lock:
                print_final_table(summary, report, file=self._stream or sys.stdout, plain=True)
        elif report is not None:
            self._line(f"report: {report}")


class QuietView:
    """Warnings and errors only, on standard error.

    Args:
        stream: where to write; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._plain = PlainView(stream or sys.stderr)
        self._round = 0

    def start(self, info: RunInfo) -> None:
        """Nothing."""

    def phase_started(self, phase: str, rounds: int) -> None:
        """Nothing."""

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        """Remember the round, for warnings."""
        self._round = number

    def client_done(
        self,
        client: str,
        *,
        loss: float | None = None,
        accuracy: float | None = None,
        samples: int | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002
        refused: str | None = None,
    ) -> None:
        """Write refusals."""
        if refused is not None:
            self._plain.message(f"round {self._round}, client {client}: update refused: {refused}", "warning")

    def round_done(
        self,
        number: int,
        *,
        loss: float | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002
    ) -> None:
        """Nothing."""

    def evaluation(
        self,
        phase: str,
        number: int,
        *,
        accuracy: float,
        loss: float | None = None,
        samples: int | None = None,
        metric: str = "accuracy",
    ) -> None:
        """Nothing."""

    def message(self, text: str, level: str = "info") -> None:
        """Write warnings and errors."""
        if level != "info":
            self._plain.message(text, level)

    def finish(
        self, summary: Summary | None = None, *, report: Path | None = None, error: str | None = None
    ) -> None:
        """Write the error, if there is one."""
        if error is not None:
            self._plain.finish(error=error)


def _numbers(
    *,
    loss: float | None = None,
    accuracy: float | None = None,
    samples: int | None = None,
    seconds: float | None = None,
    sizes: Mapping[str, int] | None = None,
    metric: str = "accuracy",
) -> str:
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if accuracy is not None:
        parts.append(f"{metric} {format_percent(accuracy)}")
    if samples is not None:
        parts.append(f"{samples:,} samples")
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    if sizes:
        parts.append(", ".join(f"{plane.replace('_', ' ')} {format_bytes(n)}" for plane, n in sizes.items()))
    return (": " + ", ".join(parts)) if parts else ""
