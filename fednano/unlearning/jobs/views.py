"""What people and scripts are shown of jobs, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fednano.errors import FednanoError, ReceiptInvalid
from fednano.runs.tombstones import commit_pending, read_alarms, read_tombstones
from fednano.security.canonical import canonical, sha256_hex
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.job import Job
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.receipt import verify_receipt
from fednano.unlearning.jobs.states import State

__all__ = ["check_job", "details", "note", "summary"]


def summary(job: Job) -> dict[str, Any]:
    """One job in a few words."""
    return {
        "job": job.id,
        "site": job.site,
        "state": job.state.value,
        "scope": job.request["kind"],
        "samples": len(job.request["ids"]),
        "method": job.request["method"],
        "submitted": job.created,
        "updated": job.updated,
        "deadline": job.request["deadline"],
        "overdue": job.overdue(),
        "note": job.note,
    }


def note(probe: Mapping[str, Any]) -> str:
    """What a probe found, in a few words."""
    words = [f"{probe['samples']} samples"]
    for name, title in (
        ("exact_memorisation", "exact memorisation"),
        ("level", "unseen"),
        ("probability", "probability"),
        ("speed", "relearned at unseen's speed times"),
    ):
        if isinstance(probe.get(name), (int, float)):
            words.append(f"{title} {probe[name]:.3f}")
    return ", ".join(words)


def details(desk: Desk, job: Job) -> dict[str, Any]:
    """Everything about one job but the hashes of its ids."""
    request = {key: value for key, value in job.request.items() if key != "ids"}
    return {
        **summary(job),
        "request": request,
        "signed_by": job.envelope["public_key"],
        "approvals": {
            "needed": desk.needed(job),
            "given": [{"name": a["name"], "time": a["time"]} for a in desk.valid_approvals(job)],
        },
        "batch": job.batch,
        "rounds": desk.store.rounds(job.batch) if job.batch else [],
        "facts": job.facts,
        "alarms": read_alarms(desk.place.folder.path, job.id),
        "history": [vars(move) for move in desk.store.history(job.id)],
    }


def check_job(place: Place, job: Job, public: str) -> list[dict[str, Any]]:
    """Check a committed job against what is on disk.

    Args:
        place: the run's job files.
        job: the job.
        public: the server's public key, hexadecimal.

    Returns:
        One ``{"check", "holds", "note"}`` for each thing that was checked.
    """
    rows: list[dict[str, Any]] = []

    def row(check: str, holds: bool, note: str = "") -> None:
        rows.append({"check": check, "holds": holds, "note": note})

    row("the job is committed", job.state is State.COMMITTED, f"it is {job.state.value}")
    row("no exchange of the adapter is unfinished", not commit_pending(place.folder.path))
    try:
        content = place.receipt(job.id).read_bytes()
        body = verify_receipt(content, public, log=place.root / "log.jsonl")
        row("the receipt is signed by the server and stands in the log", True)
    except (OSError, ReceiptInvalid) as error:
        row("the receipt is signed by the server and stands in the log", False, str(error))
        return rows
    same = body["job"] == job.id and body["request_sha256"] == sha256_hex(canonical(job.request))
    row("the receipt is about this request", same)
    forgotten = read_tombstones(place.folder.path)
    held = {each for item in forgotten.sets if item.site == job.site for each in item.hashes}
    missing = len(set(job.request["ids"]) - held)
    row("tombstones hold every sample", not missing, f"{missing} are missing" if missing else "")
    try:
        current = place.adapter()[0]
    except (FednanoError, OSError) as error:
        row("the adapter is whole", False, str(error))
        return rows
    later = forgotten.epoch > body["tombstones_epoch"] or current != body["adapter"]["after"]
    row("the adapter is not the one of before", current != body["adapter"]["before"])
    row("the adapter is whole", True, "it was changed since, with these tombstones in force" if later else "")
    return rows
