"""The live view: one block in the terminal that redraws itself at most four times a second.

Messages scroll above it. Everything that another part of the process prints through ``sys.stdout`` or
``sys.stderr`` meanwhile appears above the block too. Colours respect ``NO_COLOR``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fednano.runs.progress import PLANES, RunInfo
from fednano.runs.table import print_final_table
from fednano.runs.text import ZERO_SHOT, format_bytes, format_percent, format_seconds, phase_title

if TYPE_CHECKING:
    from fednano.runs.summary import Summary

__all__ = ["LiveView", "sparkline"]

REDRAWS_PER_SECOND = 4
_BARS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Progress bar with round, clients, loss, accuracy, time left and bytes by plane.

    Args:
        stream: the terminal; standard output by default.
        console: a rich console to draw on, instead of ``stream``.
        clock: seconds; a test may turn it.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(file=stream)
        self._clock = clock
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._finished = False
        self._info: RunInfo | None = None
        self._begin = clock()
        self._phase = ""
        self._rounds = 0
        self._round = 0
        self._rounds_done = 0
        self._phase_begin = self._begin
        self._status: dict[str, str] = {}
        self._losses: list[float] = []
        self._accuracies: list[float] = []
        self._zero_shot: float | None = None
        self._metric = "accuracy"
        self._bytes: dict[str, int] = {}

    # events

    def start(self, info: RunInfo) -> None:
        """Draw the block for the first time."""
        with self._lock:
            self._info = info
            self._begin = self._phase_begin = self._clock()
            self._live = Live(
                get_renderable=self.render,
                console=self._console,
                refresh_per_second=REDRAWS_PER_SECOND,
                transient=True,
            )
            self._live.start()

    def phase_started(self, phase: str, rounds: int) -> None:
        """Begin a new bar."""
        with self._lock:
            self._phase, self._rounds, self._round, self._rounds_done = phase, rounds, 0, 0
            self._phase_begin = self._clock()
            self._status, self._losses, self._accuracies = {}, [], []
            self._bytes = {}

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        """Show the clients as waiting."""
        with self._lock:
            self._round = number
            self._status = dict.fromkeys(clients, "waiting")

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
        """Tick the client off."""
        with self._lock:
            self._status[client] = "done" if refused is None else "refused"
        if refused is not None:
            self.message(f"round {self._round}, client {client}: update refused: {refused}", "warning")

    def round_done(
        self,
        number: int,
        *,
        loss: float | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002
    ) -> None:
        """Move the bar."""
        with self._lock:
            self._rounds_done = number
            if loss is not None:
                self._losses.append(loss)
            for plane, count in (bytes or {}).items():
                self._bytes[plane] = self._bytes.get(plane, 0) + count

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
        """Show the accuracy."""
        with self._lock:
            self._metric = metric
            if phase == ZERO_SHOT:  # judged once more, on all questions, while the main phase is shown
                self._zero_shot = accuracy
            else:
                self._accuracies.append(accuracy)
        if not number:
            asked = f" on {samples:,} test questions" if samples else ""
            self.message(f"{phase_title(phase)}: {metric} {format_percent(accuracy)}{asked}")

    def message(self, text: str, level: str = "info") -> None:
        """Print a line above the block."""
        style = {"warning": "yellow", "error": "bold red"}.get(level, "")
        prefix = "" if level == "info" else f"{level}: "
        self._console.print(Text(prefix + text, style=style), soft_wrap=True)

    def finish(
        self, summary: Summary | None = None, *, report: Path | None = None, error: str | None = None
    ) -> None:
        """Remove the block and print the final table, or the error."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
            live, self._live = self._live, None
        if live is not None:
            live.stop()
        if error is not None:
            self.message(error, "error")
        if summary is not None:
            print_final_table(summary, report, console=self._console)
        elif report is not None:
            self.message(f"report: {report}")

    # drawing

    def render(self) -> RenderableType:
        """The block as it stands now."""
        with self._lock:
            rows: list[RenderableType] = [self._head(), self._bar()]
            if self._status:
                rows.append(self._clients())
            rows.append(self._figures())
            if self._bytes:
                rows.append(self._wire())
            return Group(*rows)

    def seconds_left(self) -> float | None:
        """Estimated seconds to the end of the phase, from the rounds done and the clients done in this one;
        None before any."""
        with self._lock:
            done = self._progress()
            if done <= 0 or not self._rounds:
                return None
            return max(0.0, (self._clock() - self._phase_begin) * (self._rounds - done) / done)

    def _progress(self) -> float:
        finished = sum(status != "waiting" for status in self._status.values())
        partial = finished / len(self._status) if self._status and self._round > self._rounds_done else 0.0
        return self._rounds_done + partial

    def _head(self) -> Text:
        info = self._info
        head = Text("fednano", style="bold")
        if info is not None:
            head.append(f"  {info.run_id}", style="cyan")
            words = (info.model, info.dataset, info.adapter, info.rule)
            head.append("  " + " · ".join(word for word in words if word), style="dim")
        head.truncate(self._console.width, overflow="ellipsis")
        return head

    def _bar(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=False)
        title = Text(phase_title(self._phase) or "starting", style="bold")
        elapsed = format_seconds(self._clock() - self._begin)
        if not self._rounds:
            grid.add_row(title, Text(f"elapsed {elapsed}", style="dim"))
            return grid
        left = self.seconds_left()
        bar = ProgressBar(
            total=self._rounds, completed=self._progress(), width=max(10, min(40, self._console.width - 60))
        )
        grid.add_row(
            title,
            bar,
            Text(f"round {max(self._round, self._rounds_done)}/{self._rounds}"),
            Text(f"elapsed {elapsed}, left {'-' if left is None else format_seconds(left)}", style="dim"),
        )
        return grid

    def _clients(self) -> Text:
        marks = {
            "done": ("●" if self._unicode() else "+", "green"),
            "refused": ("✗" if self._unicode() else "x", "red"),
            "waiting": ("○" if self._unicode() else ".", "dim"),
        }
        line = Text("clients ", style="dim")
        for client, status in list(self._status.items())[:24]:
            mark, style = marks[status]
            line.append(f"{mark} {client}  ", style=style)
        if len(self._status) > 24:
            line.append(f"and {len(self._status) - 24} more", style="dim")
        return line

    def _figures(self) -> Text:
        parts: list[str] = []
        if self._losses:
            parts.append(f"loss {self._losses[-1]:.4f} {self._spark(self._losses)}".rstrip())
        if self._accuracies:
            text = f"{self._metric} {format_percent(self._accuracies[-1])} {self._spark(self._accuracies)}".rstrip()
            if self._zero_shot is not None and self._phase != ZERO_SHOT:
                text += f" (zero-shot {format_percent(self._zero_shot)})"
            parts.append(text)
        return Text("   ".join(parts) or "waiting for the first numbers", style="" if parts else "dim")

    def _wire(self) -> Text:
        parts: list[str] = []
        for plane in ("adapter", "activation"):
            up, down = (self._bytes.get(f"{plane}_{way}", 0) for way in ("up", "down"))
            if up or down:
                name = "adapters" if plane == "adapter" else "activations"
                parts.append(f"{name} {format_bytes(up)} up, {format_bytes(down)} down")
        parts += [f"{key} {format_bytes(n)}" for key, n in self._bytes.items() if key not in PLANES]
        return Text.assemble(("wire    ", "dim"), "   ".join(parts))

    def _spark(self, values: Sequence[float]) -> str:
        return sparkline(values) if self._unicode() and len(values) > 1 else ""

    def _unicode(self) -> bool:
        return self._console.encoding.lower().startswith("utf")


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """The last ``width`` finite values as block characters, the lowest as the lowest block."""
    last = [value for value in values if value - value == 0][-width:]
    if not last:
        return ""
    low, high = min(last), max(last)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in last)
