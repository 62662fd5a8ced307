"""How the app's work ended, read from what it wrote among a run's events."""

from __future__ import annotations

from pathlib import Path

from fednano.runs import RunFolder
from fednano.unlearning.live import ENDED, ENDED_EARLY

__all__ = ["error_of", "how_it_ended"]


def error_of(folder: Path, known: int) -> str:
    """The error that a run ended with; empty while there is none.

    Args:
        folder: the run.
        known: how many of its events were there before it was started.
    """
    errors = (e for e in reversed(RunFolder(folder).events()[known:]) if e.get("level") == "error")
    return next((str(event.get("text", "")) for event in errors), "")


def how_it_ended(folder: Path, known: int) -> str | None:
    """Why the app's work on a run's queue ended early; empty when it ended well; ``None`` while it has not ended.

    Args:
        folder: the run.
        known: how many of its events were there before the app was started.
    """
    for event in RunFolder(folder).events()[known:]:
        text = str(event.get("text", ""))
        if text == ENDED:
            return ""
        if text.startswith(ENDED_EARLY):
            return text.removeprefix(ENDED_EARLY)
    return None
