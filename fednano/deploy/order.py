"""One thing that the server is to do, as its file says it."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

__all__ = ["JOBS", "RUN", "Order", "new_id"]

RUN, JOBS = "run", "jobs"
"""Kinds of orders."""


@dataclass(frozen=True)
class Order:
    """A run that is to be, or a run's unlearning jobs.

    Attributes:
        id: sorts by time.
        settings: of the run, those that differ from the defaults; of jobs, whether their updates may be unprotected.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        run: id of its run folder, once there is one.
        attempts: how often it was started; of a run, since its last finished round; of jobs, since their work ended
            well the last time.
        started: of the newest attempt, seconds since 1970.
        before: run folders that were there before it started.
        note: why it failed, or waits.
        kind: ``run`` or ``jobs``.
        jobs: ids of the jobs that could be worked on when it was last looked at.
        after: not to be started earlier, seconds since 1970.
        rounds: of a run, how many were finished before the newest attempt.
        events: how many events the run had before the newest attempt.
    """

    id: str
    settings: dict[str, Any]
    state: str = "waiting"
    run: str = ""
    attempts: int = 0
    started: float = 0.0
    before: tuple[str, ...] = ()
    note: str = ""
    kind: str = RUN
    jobs: tuple[str, ...] = ()
    after: float = 0.0
    rounds: int = 0
    events: int = 0


def new_id() -> str:
    """An id for an order; later ones sort behind earlier ones."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:6]}"
