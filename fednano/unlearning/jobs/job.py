"""A job as it is kept, and how times are written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fednano.unlearning.jobs.states import FINAL, State

__all__ = ["Job", "Move", "now", "parse_time", "timestamp"]


def now() -> datetime:
    """The present, in UTC, to the microsecond."""
    return datetime.now(UTC)


def timestamp(moment: datetime | None = None) -> str:
    """RFC 3339 in UTC, microseconds included; sorts as time does."""
    return f"{(moment or now()).astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def parse_time(text: str) -> datetime:
    """Inverse of :func:`timestamp`; any ISO 8601 time with an offset, and a bare date as its end in UTC.

    Raises:
        ValueError: neither.
    """
    if len(text) == len("2026-01-31"):
        return datetime.fromisoformat(f"{text}T23:59:59+00:00")
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; add 'Z' for UTC")
    return moment.astimezone(UTC)


@dataclass(frozen=True)
class Move:
    """One change of state."""

    source: str
    target: str
    actor: str
    time: str
    note: str


@dataclass(frozen=True)
class Job:
    """One job as the store holds it.

    Attributes:
        id: ``u0001``, ``u0002``, ... in the order of submission.
        key: what makes two requests the same request.
        site: the owner.
        state: where it stands.
        created: time of submission.
        updated: time of the last change.
        envelope: the signed request.
        facts: what was found out on the way, by name: number of samples, first exposure, receipt, purge.
        note: the last thing worth telling.
        batch: id of the first of the jobs it is worked on together with; empty before it runs.
        stop: who asked to cancel it while it was running; empty when nobody did.
    """

    id: str
    key: str
    site: str
    state: State
    created: str
    updated: str
    envelope: dict[str, Any]
    facts: dict[str, Any]
    note: str
    batch: str
    stop: str

    @property
    def request(self) -> dict[str, Any]:
        """What the site signed."""
        body: dict[str, Any] = self.envelope["request"]
        return body

    def overdue(self, moment: datetime | None = None) -> bool:
        """Whether the deadline has passed with the job not yet at an end."""
        deadline = str(self.request["deadline"])
        return bool(deadline) and self.state not in FINAL and parse_time(deadline) < (moment or now())
