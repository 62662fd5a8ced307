"""A view that also tells trackers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fednano.errors import ConfigError

if TYPE_CHECKING:
    from fednano.runs.progress import RunInfo, RunView
    from fednano.runs.summary import Summary
    from fednano.tracking.protocol import Tracker

__all__ = ["TrackedView", "tracked"]

Settings = Mapping[str, bool | int | float | str]


def tracked(view: RunView, trackers: Sequence[tuple[str, Tracker]], settings: Settings) -> RunView:
    """``view``, which also tells ``trackers``; ``view`` itself where there are none."""
    return TrackedView(view, trackers, settings) if trackers else view


class TrackedView:
    """Passes a run's events on to a view, and its numbers to trackers.

    Args:
        view: what the user sees.
        trackers: name and tracker of each.
        settings: the run's settings, for ``start``.
    """

    def __init__(self, view: RunView, trackers: Sequence[tuple[str, Tracker]], settings: Settings) -> None:
        self._view = view
        self._trackers = list(trackers)
        self._settings = settings
        self._lock = threading.RLock()
        self._phase, self._round, self._refused = "", 0, 0
        self._finished = False

    def start(self, info: RunInfo) -> None:
        """The run begins. Raises ConfigError where a tracker cannot work at all."""
        self._view.start(info)
        self._each(lambda tracker: tracker.start(info, self._settings))

    def phase_started(self, phase: str, rounds: int) -> None:
        """A phase begins."""
        self._view.phase_started(phase, rounds)
        with self._lock:
            self._phase, self._round, self._refused = phase, 0, 0

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        """A round begins."""
        self._view.round_started(number, clients)
        with self._lock:
            self._round, self._refused = number, 0

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
        """A client's update arrived."""
        self._view.client_done(
            client,
            loss=loss,
            accuracy=accuracy,
            samples=samples,
            seconds=seconds,
            bytes=bytes,
            refused=refused,
        )
        with self._lock:
            if refused is not None:
                self._refused += 1
                return
            own = {"loss": loss, "accuracy": accuracy, "samples": samples, "seconds": seconds}
            self._log(
                {f"clients/{client}/{key}": value for key, value in own.items()}, self._phase, self._round
            )

    def round_done(
        self,
        number: int,
        *,
        loss: float | None = None,
        seconds: float | None = None,
        bytes: Mapping[str, int] | None = None,  # noqa: A002
    ) -> None:
        """A round was merged."""
        self._view.round_done(number, loss=loss, seconds=seconds, bytes=bytes)
        with self._lock:
            sent = {f"bytes/{plane}": count for plane, count in (bytes or {}).items()}
            known = {"train_loss": loss, "seconds": seconds, "refused": self._refused, **sent}
            self._log(known, self._phase, number)

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
        """The model was evaluated."""
        self._view.evaluation(phase, number, accuracy=accuracy, loss=loss, samples=samples, metric=metric)
        self._log({"score": accuracy, "test_loss": loss}, phase, number)

    def message(self, text: str, level: str = "info") -> None:
        """Something to know."""
        self._view.message(text, level)

    def finish(
        self, summary: Summary | None = None, *, report: Path | None = None, error: str | None = None
    ) -> None:
        """The run ended."""
        with self._lock:
            first, self._finished = not self._finished, True
        if first:
            status = summary.status if summary is not None else "failed" if error is not None else "complete"
            self._each(lambda tracker: tracker.finish(status))
        self._view.finish(summary, report=report, error=error)

    def _log(self, values: Mapping[str, float | None], phase: str, step: int) -> None:
        known = {
            f"{phase}/{name}": float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }
        if known:
            self._each(lambda tracker: tracker.log(known, step=step))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        with self._lock:
            for entry in list(self._trackers):
                name, tracker = entry
                try:
                    call(tracker)
                except ConfigError:
                    raise
                except Exception as error:  # whatever somebody else's client raises: the run matters more
                    self._trackers.remove(entry)
                    self._view.message(
                        f"{name} is left out from here on: {type(error).__name__}: {error}", "warning"
                    )
