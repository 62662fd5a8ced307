"""What each bearer of a token takes of the host, held to its allowance: no one site can crowd out the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fednano.errors import HostRefused
from fednano.host.pool import BusyError
from fednano.security.tokens import Allowance

__all__ = ["Quotas"]

_MOST_BEARERS = 10_000


@dataclass
class _Use:
    """What one bearer takes now.

    Attributes:
        calls: calls that it may still begin, as a number that refills with time.
        seen: when ``calls`` was counted.
        open: calls under way.
        nbytes: their tensor bytes.
    """

    calls: float
    seen: float
    open: int = 0
    nbytes: int = 0


class Quotas:
    """Counts per bearer, on the event loop of a host.

    Args:
        now: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def call(self, bearer: str, allowance: Allowance | None) -> Iterator[None]:
        """Hold a place for one call, from its first byte to its last.

        Raises:
            BusyError: the bearer has too many calls open, or began too many of late; it may try again later.
        """
        if allowance is None:
            yield
            return
        use = self._use(bearer, allowance)
        if use.open >= allowance.open_calls:
            raise BusyError(f"this token allows {allowance.open_calls} calls at a time; try again later")
        if use.calls < 1:
            raise BusyError(f"this token allows {allowance.calls_per_minute} calls a minute; try again later")
        use.calls -= 1
        use.open += 1
        try:
            yield
        finally:
            use.open -= 1

    @contextmanager
    def hold(self, bearer: str, allowance: Allowance | None, nbytes: int) -> Iterator[None]:
        """Hold ``nbytes`` of tensors of a call.

        Raises:
            HostRefused: more than one call may have.
            BusyError: more than all calls of the bearer may have at a time.
        """
        if allowance is None:
            yield
            return
        if nbytes > min(allowance.request_bytes, allowance.buffered_bytes):
            most = min(allowance.request_bytes, allowance.buffered_bytes)
            raise HostRefused(
                f"request beyond the token's request_bytes: got {nbytes}, expected at most {most}; "
                "send fewer or shorter samples at a time"
            )
        use = self._use(bearer, allowance)
        if use.nbytes + nbytes > allowance.buffered_bytes:
            raise BusyError(
                f"this token allows {allowance.buffered_bytes} bytes at a time, {use.nbytes} are in use; wait"
            )
        use.nbytes += nbytes
        try:
            yield
        finally:
            use.nbytes -= nbytes

    def _use(self, bearer: str, allowance: Allowance) -> _Use:
        now = self._now()
        use = self._uses.get(bearer)
        if use is None:
            if len(self._uses) >= _MOST_BEARERS:  # of runs long past
                self._uses = {name: each for name, each in self._uses.items() if each.open}
            use = self._uses[bearer] = _Use(allowance.calls_per_minute, now)
        most = allowance.calls_per_minute
        use.calls = min(most, use.calls + (now - use.seen) * most / 60)
        use.seen = now
        return use
