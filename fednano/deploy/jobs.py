"""Unlearning jobs as the server sees them between two looks: what is in the stores of its runs, and what can be done.

Nothing here unlearns, or loads what does.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednano.errors import DataError
from fednano.federation.config import OTHER_WORK, UNPROTECTED, RunConfig
from fednano.runs import RunFolder
from fednano.unlearning.jobs.states import State
from fednano.unlearning.protection import require_unprotected

__all__ = ["Listed", "listed", "settings_for", "workable"]

_WORKABLE = frozenset({State.SUBMITTED, State.APPROVED, State.QUEUED, State.RUNNING, State.VERIFYING})
"""A validated job waits for approvals. Of the others a worker was killed, or none has come yet."""


@dataclass(frozen=True)
class Listed:
    """A job in the store of its run.

    Attributes:
        run: id of the run.
        job: its id in that run.
        site: whose samples are to be forgotten.
        state: one of `State`.
        note: why it stands there, if that was said.
        round: the newest round while it runs, such as ``"2/5"``.
    """

    run: str
    job: str
    site: str
    state: str
    note: str = ""
    round: str = ""


def listed(runs: Path) -> list[Listed]:
    """The jobs of all runs in a folder, by run and id.

    Raises:
        DataError: a store cannot be read.
    """
    found = []
    for path in sorted(runs.glob("*/unlearning/jobs.sqlite")):
        run = path.parents[1]
        if run.is_symlink():
            continue
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2)) as database:
                rows = database.execute(
                    "SELECT id, site, state, note, batch FROM jobs ORDER BY id"
                ).fetchall()
                for job, site, state, note, batch in rows:
                    newest = _newest_round(database, batch) if state == State.RUNNING else ""
                    found.append(Listed(run.name, job, site, state, note, newest))
        except sqlite3.Error as error:
            raise DataError(
                f"the unlearning jobs in {path} cannot be read: {error}. Check the disk, and restore the file from a "
                "backup if it is damaged."
            ) from error
    return found


def workable(jobs: Iterable[Listed]) -> dict[str, list[Listed]]:
    """Run to those of its jobs that a worker could carry on now."""
    found: dict[str, list[Listed]] = {}
    for job in jobs:
        if job.state in _WORKABLE:
            found.setdefault(job.run, []).append(job)
    return found


def settings_for(folder: Path, *, unprotected: bool) -> dict[str, Any]:
    """The app's settings that make it work on a run's queue.

    Args:
        folder: the run.
        unprotected: the operator allows that a job's updates lack the protection of the run's.

    Raises:
        RunError: the run's updates were protected, and that is not allowed; or the run has no adapter yet.
    """
    recorded = RunFolder(folder).config()
    config = RunConfig.from_mapping(
        {name: value for name, value in recorded.items() if name not in ("created", "command")}
    )
    require_unprotected(config, allowed=unprotected)
    return {
        OTHER_WORK: str(folder),
        UNPROTECTED: unprotected,
        "round-timeout": config.round_timeout,
        "join-timeout": config.join_timeout,
    }


def _newest_round(database: sqlite3.Connection, batch: str) -> str:
    row = database.execute(
        "SELECT record FROM rounds WHERE batch = ? ORDER BY number DESC LIMIT 1", (batch,)
    ).fetchone()
    record = json.loads(row[0]) if row else {}
    return f"{record['number']}/{record['of']}" if record else ""
