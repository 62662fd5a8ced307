"""What a tracker is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fednano.runs import RunInfo

__all__ = ["Tracker"]


class Tracker(Protocol):
    """Takes a run's numbers as they come. Calls never overlap.

    A tracker that raises is left out for the rest of the run, with a warning: no run ends because a tracking server
    is away. What it raises in ``start`` as a :class:`fednano.errors.ConfigError` does end the run, before it began.
    """

    def start(self, info: RunInfo, settings: Mapping[str, bool | int | float | str]) -> None:
        """The run begins.

        Args:
            info: the run's name, folder, and what it is about.
            settings: all settings, under hyphenated keys; secrets are not among them.
        """

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Numbers of one moment.

        Args:
            values: name -> finite number. Names are ``PHASE/score``, ``PHASE/test_loss`` (the model on the test set),
                ``PHASE/train_loss``, ``PHASE/seconds``, ``PHASE/refused``, ``PHASE/bytes/PLANE`` (of a round), and
                ``PHASE/clients/CLIENT/loss``, ``/accuracy``, ``/seconds``, ``/samples``.
            step: round of the phase, from 1; 0 is before training.
        """

    def finish(self, status: str) -> None:
        """The run ended: ``"complete"``, ``"interrupted"`` or ``"failed"``. Called once."""
