"""The states of a job and the ways between them. Whatever is not in :data:`MOVES` is refused by the store."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["FINAL", "MOVES", "State"]


class State(StrEnum):
    """Where a job stands."""

    SUBMITTED = "submitted"
    VALIDATED = "validated"
    APPROVED = "approved"
    QUEUED = "queued"
    RUNNING = "running"
    VERIFYING = "verifying"
    COMMITTED = "committed"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ROLLED_BACK = "rolled-back"


_S = State

MOVES: dict[State, frozenset[State]] = {
    _S.SUBMITTED: frozenset({_S.VALIDATED, _S.REJECTED, _S.CANCELLED}),
    _S.VALIDATED: frozenset({_S.APPROVED, _S.REJECTED, _S.CANCELLED}),
    _S.APPROVED: frozenset({_S.QUEUED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.RUNNING, _S.REJECTED, _S.CANCELLED}),
    # Back to the queue: its worker was killed or stopped, or the owner is offline.
    _S.RUNNING: frozenset({_S.VERIFYING, _S.QUEUED, _S.FAILED, _S.CANCELLED}),
    # Back to the queue: somebody trained the adapter on in the meantime.
    _S.VERIFYING: frozenset({_S.COMMITTED, _S.QUEUED, _S.REJECTED, _S.FAILED, _S.CANCELLED}),
    _S.COMMITTED: frozenset({_S.ROLLED_BACK}),
    _S.REJECTED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.ROLLED_BACK: frozenset(),
}

FINAL = frozenset({_S.COMMITTED, _S.REJECTED, _S.FAILED, _S.CANCELLED, _S.ROLLED_BACK})
"""States in which nothing more happens by itself."""
