"""The jobs of one run in SQLite: a write-ahead log, full synchronisation, one transaction for each change.

A transaction is committed before anything is said about it, so that whatever a user or another process has seen
survives `kill -9` and a power cut. Every move of a job is written down with its time and its actor.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fednano.errors import JobStateError, RequestRefused, RunError
from fednano.runs.atomic import disk_advice
from fednano.unlearning.jobs.job import Job, Move, timestamp
from fednano.unlearning.jobs.states import FINAL, MOVES, State

__all__ = ["Store", "only_worker"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, site TEXT NOT NULL, state TEXT NOT NULL, created TEXT NOT NULL,
    updated TEXT NOT NULL, envelope TEXT NOT NULL, facts TEXT NOT NULL DEFAULT '{}', note TEXT NOT NULL DEFAULT '',
    batch TEXT NOT NULL DEFAULT '', stop TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS jobs_by_key ON jobs (key);
CREATE TABLE IF NOT EXISTS moves (
    job TEXT NOT NULL, number INTEGER NOT NULL, source TEXT NOT NULL, target TEXT NOT NULL, actor TEXT NOT NULL,
    time TEXT NOT NULL, note TEXT NOT NULL, PRIMARY KEY (job, number)
);
CREATE TABLE IF NOT EXISTS rounds (
    batch TEXT NOT NULL, number INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (batch, number)
);
CREATE TABLE IF NOT EXISTS approvals (
    job TEXT NOT NULL, public TEXT NOT NULL, name TEXT NOT NULL, time TEXT NOT NULL, signature TEXT NOT NULL,
    PRIMARY KEY (job, public)
);
CREATE TABLE IF NOT EXISTS nonces (nonce TEXT PRIMARY KEY, job TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS refusals (time TEXT NOT NULL, site TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS intents (batch TEXT PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL);
"""


class Store:
    """Jobs on disk. Safe from several threads and processes: each call opens its own connection.

    Args:
        path: the database file; made with its folder if needed.

    Raises:
        RunError: the database cannot be opened, or the disk is full; then nothing was changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.chmod(0o700)
        except OSError as error:
            raise RunError(
                f"cannot make {path.parent}: {disk_advice(path.parent.parent, 0, error)}"
            ) from error
        with self.transaction() as database:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: everything in it happens, or nothing."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as database:
                database.row_factory = sqlite3.Row
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=FULL")
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                except BaseException:
                    database.execute("ROLLBACK")
                    raise
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise RunError(
                f"the job database {self.path} refused a change: {error}. Nothing was changed. Check free space and "
                "permissions, and that the folder is on a local disk."
            ) from error

    def add(self, key: str, envelope: Mapping[str, Any], *, actor: str) -> tuple[Job, bool]:
        """File a request whose signature was checked; the second submission of one request is the first one's job.

        Returns:
            The job, and whether it is new.

        Raises:
            RequestRefused: the request's nonce was used before, by a job that has ended.
        """
        request = envelope["request"]
        with self.transaction() as database:
            seen = database.execute("SELECT job FROM nonces WHERE nonce = ?", (request["nonce"],)).fetchone()
            if seen is not None:
                job = _job(database, seen["job"])
                if job.envelope != envelope or job.state in FINAL:
                    raise RequestRefused(
                        f"replayed: the nonce of this request was used by {job.id}, which is {job.state.value}. Sign a "
                        "new request."
                    )
                return job, False
            for row in database.execute("SELECT id FROM jobs WHERE key = ? ORDER BY id", (key,)).fetchall():
                job = _job(database, row["id"])
                if job.state not in FINAL or job.state is State.COMMITTED:
                    return job, False
            number = database.execute("SELECT COUNT(*) FROM jobs").fetchone()[0] + 1
            identity, time = f"u{number:04d}", timestamp()
            database.execute(
                "INSERT INTO jobs (id, key, site, state, created, updated, envelope) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (identity, key, request["site"], State.SUBMITTED.value, time, time, json.dumps(envelope)),
            )
            database.execute("INSERT INTO nonces VALUES (?, ?)", (request["nonce"], identity))
            _write_move(database, identity, "", State.SUBMITTED.value, actor, time, "")
            return _job(database, identity), True

    def move(
        self,
        jobs: Sequence[str],
        target: State,
        *,
        actor: str,
        note: str = "",
        facts: Mapping[str, Any] | None = None,
        batch: str | None = None,
        done: str | None = None,
    ) -> list[Job]:
        """Move jobs to a state together.

        Args:
            jobs: ids.
            target: the new state.
            actor: who does it.
            note: why; shown to users.
            facts: further facts to keep.
            batch: the batch they belong to from now on.
            done: a commit's intent that is fulfilled by this move.

        Raises:
            JobStateError: one of them cannot go there from where it stands; none is moved.
        """
        with self.transaction() as database:
            time = timestamp()
            for identity in jobs:
                job = _job(database, identity)
                if target not in MOVES[job.state]:
                    ways = ", ".join(sorted(s.value for s in MOVES[job.state])) or "nowhere: it has ended"
                    raise JobStateError(
                        f"job {identity} is {job.state.value} and cannot become {target.value}; from here "
                        f"it goes to: {ways}."
                    )
                database.execute(
                    "UPDATE jobs SET state = ?, updated = ?, note = ?, facts = ?, batch = ?, stop = ? WHERE id = ?",
                    (
                        target.value,
                        time,
                        note,
                        json.dumps(job.facts | dict(facts or {})),
                        job.batch if batch is None else batch,
                        "" if target is State.QUEUED else job.stop,
                        identity,
                    ),
                )
                _write_move(database, identity, job.state.value, target.value, actor, time, note)
            if done is not None:
                database.execute("DELETE FROM intents WHERE batch = ?", (done,))
            return [_job(database, identity) for identity in jobs]

    def job(self, identity: str) -> Job:
        """One job. Raises JobStateError where there is none of that id."""
        with self.transaction() as database:
            return _job(database, identity)

    def jobs(self, *states: State) -> list[Job]:
        """All jobs in these states, or all; oldest first."""
        with self.transaction() as database:
            rows = database.execute("SELECT * FROM jobs ORDER BY id").fetchall()
        found = [_as_job(row) for row in rows]
        return [job for job in found if not states or job.state in states]

    def history(self, identity: str) -> list[Move]:
        """Every move of a job, in order."""
        with self.transaction() as database:
            rows = database.execute(
                "SELECT source, target, actor, time, note FROM moves WHERE job = ? ORDER BY number",
                (identity,),
            ).fetchall()
        return [Move(*row) for row in rows]

    def add_facts(self, identity: str, facts: Mapping[str, Any]) -> None:
        """Keep further facts about a job."""
        with self.transaction() as database:
            job = _job(database, identity)
            database.execute(
                "UPDATE jobs SET facts = ?, updated = ? WHERE id = ?",
                (json.dumps(job.facts | dict(facts)), timestamp(), identity),
            )

    def ask_to_stop(self, identity: str, actor: str) -> None:
        """Ask the worker of a running job to give it up at its next safe point."""
        with self.transaction() as database:
            database.execute("UPDATE jobs SET stop = ? WHERE id = ?", (actor, identity))

    def add_round(self, batch: str, number: int, record: Mapping[str, Any]) -> None:
        """Keep what was measured in a round of a batch; a round worked on again replaces itself."""
        with self.transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?)", (batch, number, json.dumps(record))
            )

    def clear_rounds(self, batch: str) -> None:
        """Forget the rounds of an attempt that is started again."""
        with self.transaction() as database:
            database.execute("DELETE FROM rounds WHERE batch = ?", (batch,))

    def rounds(self, batch: str) -> list[dict[str, Any]]:
        """What was measured in each round of a batch, in order."""
        with self.transaction() as database:
            rows = database.execute(
                "SELECT record FROM rounds WHERE batch = ? ORDER BY number", (batch,)
            ).fetchall()
        return [json.loads(row["record"]) for row in rows]

    def add_approval(self, job: str, public: str, name: str, signature: str) -> int:
        """Keep an approval; a key counts once. Returns how many keys have approved."""
        with self.transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO approvals VALUES (?, ?, ?, ?, ?)",
                (job, public, name, timestamp(), signature),
            )
            count = database.execute("SELECT COUNT(*) FROM approvals WHERE job = ?", (job,)).fetchone()[0]
        return int(count)

    def approvals(self, job: str) -> list[dict[str, str]]:
        """The approvals of a job, oldest first."""
        with self.transaction() as database:
            rows = database.execute(
                "SELECT name, public, time, signature FROM approvals WHERE job = ? ORDER BY time", (job,)
            ).fetchall()
        return [dict(row) for row in rows]

    def refuse(self, site: str, reason: str) -> None:
        """Write down a request that was not accepted; the newest 1000 are kept."""
        with self.transaction() as database:
            database.execute("INSERT INTO refusals VALUES (?, ?, ?)", (timestamp(), site[:64], reason[:500]))
            database.execute("DELETE FROM refusals WHERE rowid <= (SELECT MAX(rowid) FROM refusals) - 1000")

    def refusals(self) -> list[dict[str, str]]:
        """Requests that were not accepted, oldest first."""
        with self.transaction() as database:
            return [dict(row) for row in database.execute("SELECT * FROM refusals ORDER BY rowid").fetchall()]

    def intend(self, batch: str, kind: str, body: Mapping[str, Any]) -> None:
        """Promise a change of several files, which is carried out from here on even if this process is killed."""
        with self.transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO intents VALUES (?, ?, ?)", (batch, kind, json.dumps(body))
            )

    def drop_intent(self, batch: str) -> None:
        """Take back a promise none of which was carried out."""
        with self.transaction() as database:
            database.execute("DELETE FROM intents WHERE batch = ?", (batch,))

    def intents(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Promises not yet fulfilled: ``(batch, kind, body)``."""
        with self.transaction() as database:
            rows = database.execute("SELECT batch, kind, body FROM intents ORDER BY batch").fetchall()
        return [(row["batch"], row["kind"], json.loads(row["body"])) for row in rows]


@contextmanager
def only_worker(path: Path) -> Iterator[None]:
    """Hold the right to change adapter, tombstones and log; it ends with the process, however that ends.

    Raises:
        JobStateError: another process holds it.
    """
    # An open SQLite transaction is a lock that every system releases when its holder dies.
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise JobStateError(
                f"another process is working on the jobs of this run ({error}). Watch it with: fednano unlearn watch"
            ) from error
        yield


def _job(database: sqlite3.Connection, identity: str) -> Job:
    row = database.execute("SELECT * FROM jobs WHERE id = ?", (identity,)).fetchone()
    if row is None:
        known = [r["id"] for r in database.execute("SELECT id FROM jobs ORDER BY id DESC LIMIT 5").fetchall()]
        listed = f"The newest: {', '.join(known)}." if known else "This run has no jobs."
        raise JobStateError(f"there is no job {identity!r}. {listed} See: fednano unlearn list")
    return _as_job(row)


def _as_job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["state"] = State(values["state"])
    for name in ("envelope", "facts"):
        values[name] = json.loads(values[name])
    return Job(**values)


def _write_move(
    database: sqlite3.Connection, job: str, source: str, target: str, actor: str, time: str, note: str
) -> None:
    count = database.execute("SELECT COUNT(*) FROM moves WHERE job = ?", (job,)).fetchone()[0]
    database.execute(
        "INSERT INTO moves VALUES (?, ?, ?, ?, ?, ?, ?)", (job, count, source, target, actor, time, note)
    )
