"""How the app's work ended, read from what it wrote among a run's events."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from fednano.runs import RunFolder
from fednano.unlearning.live import ENDED, ENDED_EARLY

__all__ = ["error_of", "how_it_ended"]


def error_of(folder: Path, since: float) -> str:
    """The error that a run ended with after ``since`` (seconds since 1970); empty while there is none."""
    for event in reversed(RunFolder(folder).events()):
        if event.get("level") == "error":
            ended = datetime.fromisoformat(str(event["time"])).timestamp()
            return str(event.get("text", "")) if ended >= since - 1 else ""
    return ""


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
