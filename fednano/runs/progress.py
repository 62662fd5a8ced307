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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from fednano.errors import ConfigError

if TYPE_CHECKING:
    from fednano.runs.summary import Summary

__all__ = ["MODES", "PLANES", "RunInfo", "RunView", "make_view"]

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
        metric: str = "accuracy",
    ) -> None:
        """The model after round ``number`` of ``phase`` was evaluated; ``accuracy`` in [0, 1], by ``metric``."""

    def message(self, text: str, level: str = "info") -> None:
        """Something to know; ``level`` is ``"info"``, ``"warning"`` or ``"error"``."""

    def finish(
        self, summary: Summary | None = None, *, report: Path | None = None, error: str | None = None
    ) -> None:
        """The run ended: with a summary, or with ``error``. Restores the terminal; may be called twice."""


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
    from fednano.runs.plain import PlainView, QuietView

    if mode == "quiet":
        return QuietView(stream)
    if mode == "plain" or (mode == "auto" and not (stream or sys.stdout).isatty()):
        return PlainView(stream)
    from fednano.runs.live import LiveView

    return LiveView(stream)
