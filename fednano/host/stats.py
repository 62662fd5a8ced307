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
    (for want of memory); ``pass_milliseconds``, the time that the device had for them.
    Those that also fall: ``in_flight`` (requests admitted), ``buffered_bytes`` (their tensors) and ``waiting`` (steps
    received and not yet computed). These stand at 0 from the start, so that a reader finds them on an idle host too.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter(in_flight=0, buffered_bytes=0, waiting=0)

    def add(self, name: str, amount: int = 1) -> None:
        """Raise (or, by a negative amount, lower) a counter."""
        self._counts[name] += amount

    def get(self, name: str) -> int:
        """One counter, 0 if it was never raised."""
        return self._counts[name]

    def snapshot(self) -> dict[str, int]:
        """All counters that were ever raised, and those that also fall."""
        return dict(self._counts)
