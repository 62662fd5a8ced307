"""What a run tells its user while it goes on.

``RunView`` is the interface: the round loop calls it, and does not know whether anybody watches.
``PlainView`` writes a line for each event (log files, CI), ``LiveView`` (``live.py``) draws in a terminal,
``QuietView`` shows warnings and errors only. ``make_view`` chooses.

Byte counts are mappings from *plane* to bytes: ``adapter_up``, ``adapter_down`` (once a round, between client
and server) and ``activation_up``, ``activation_down`` (every step, between client and language host); up is
towards the server.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from fednano.errors import ConfigError
from fednano.runs.text import format_bytes, format_percent, format_seconds, phase_title

if TYPE_CHECKING:
    from fednano.runs.summary import Summary

__all__ = ["MODES", "PLANES", "PlainView", "QuietView", "RunInfo", "RunView", "make_view"]

PLANES = ("adapter_up", "adapter_down", "activation_up", "activation_down")
MODES = ("auto", "live", "plain", "quiet")


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run starts.

    Attributes:
        run_id: name of the run folder.
        path: the run folder.
        model: name of the model.
        dataset: name of the data set.
        adapter: name of the adapter.
        rule: name of the aggregation rule.
        clients: number of clients.
        seed: seed of the run.
        phases: the phases to come with their number of rounds, in order, for instance ``{"federated": 10}``.
    """

    run_id: str
    path: Path
    model: str = ""
    dataset: str = ""
    adapter: str = ""
    rule: str = ""
    clients: int = 0
    seed: int = 0
    phases: Mapping[str, int] = field(default_factory=dict)


class RunView(Protocol):
    """Events of a run, in the order they happen. Implementations are safe to call from several threads."""

    def start(self, info: RunInfo) -> None:
        """The run begins."""

    def phase_started(self, phase: str, rounds: int) -> None:
        """A phase of ``rounds`` rounds begins (0: an evaluation only)."""

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        """Round ``number``, from 1, begins with these clients."""

    def client_done(
        self,
        client: str,
        *,
        loss: float | None = None,
        accuracy: float | None = None,
        samples: int | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002 - the word of the files too
        refused: str | None = None,
    ) -> None:
        """A client's update arrived; ``refused`` is the reason where it was not merged."""

    def round_done(
        self,
        number: int,
        *,
        loss: float | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002
    ) -> None:
        """Round ``number`` was merged. ``loss`` is the mean training loss; ``bytes`` counts all clients of
        this round."""

    def evaluation(
        self,
        phase: str,
        number: int,
        *,
        accuracy: float,
        loss: float | None = None,
        samples: int | None = None,
    ) -> None:
        """The model after round ``number`` of ``phase`` was evaluated; ``accuracy`` in [0, 1]."""

    def message(self, text: str, level: str = "info") -> None:
        """Something to know; ``level`` is ``"info"``, ``"warning"`` or ``"error"``."""

    def finish(
        self, summary: Summary | None = None, *, report: Path | None = None, error: str | None = None
    ) -> None:
        """The run ended: with a summary, or with ``error``. Restores the terminal; may be called twice."""


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
    ) -> None:
        """Write the accuracy."""
        where = f"{phase_title(phase)}, round {number}" if number else phase_title(phase)
        self._line(f"evaluation ({where})" + _numbers(loss=loss, accuracy=accuracy, samples=samples))

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


def make_view(mode: str = "auto", *, stream: TextIO | None = None) -> RunView:
    """Choose a view.

    Args:
        mode: ``"live"``, ``"plain"``, ``"quiet"``, or ``"auto"``: live in a terminal, plain elsewhere.
        stream: where to write; standard output by default (standard error for ``"quiet"``).

    Raises:
        ConfigError: unknown mode.
    """
    if mode not in MODES:
        raise ConfigError(f"Unknown progress display {mode!r}; expected one of {', '.join(MODES)}.")
    if mode == "quiet":
        return QuietView(stream)
    if mode == "plain" or (mode == "auto" and not (stream or sys.stdout).isatty()):
        return PlainView(stream)
    from fednano.runs.live import LiveView

    return LiveView(stream)


def _numbers(
    *,
    loss: float | None = None,
    accuracy: float | None = None,
    samples: int | None = None,
    seconds: float | None = None,
    sizes: Mapping[str, int] | None = None,
) -> str:
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if accuracy is not None:
        parts.append(f"accuracy {format_percent(accuracy)}")
    if samples is not None:
        parts.append(f"{samples:,} samples")
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    if sizes:
        parts.append(", ".join(f"{plane.replace('_', ' ')} {format_bytes(n)}" for plane, n in sizes.items()))
    return (": " + ", ".join(parts)) if parts else ""
