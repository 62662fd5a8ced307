"""Counters of a host. All are written from its event loop, so no lock is needed."""

from __future__ import annotations

from collections import Counter

__all__ = ["Stats"]


class Stats:
    """Named counters: ``step_requests``, ``step_samples``, ``refused_invalid``, ...

    Those that only grow: for each call, ``<call>_requests`` (arrived), ``<call>_done``, ``<call>_samples``,
    ``<call>_tokens``, ``<call>_received_bytes`` and ``<call>_sent_bytes`` (serialised messages); ``computed``
    (jobs that ran) and ``computed_milliseconds``; for each reason, ``refused_<reason>``; ``cancelled`` (the caller
    left or its deadline passed); ``batches``, ``batched_requests`` (those that shared a pass) and ``batches_split``
    (for want of memory).
    Those that also fall: ``in_flight`` (requests admitted), ``buffered_bytes`` (their tensors) and ``waiting`` (steps
    received and not yet computed).
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1) -> None:
        """Raise (or, by a negative amount, lower) a counter."""
        self._counts[name] += amount

    def get(self, name: str) -> int:
        """One counter, 0 if it was never raised."""
        return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """All counters that were ever raised."""
        return dict(self._counts)
