"""When to launch the next pass: a moment before the device has done the one that it computes.

Between two passes requests are joined and laid out, on the CPU, by an interpreter that others want as well; for so long
the device would have nothing to do. What is launched while it still computes follows without a break. Not much earlier
though: until then requests may come that share the pass.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Ahead", "UnderWay"]

_SECONDS = 0.02
_SHARE = 0.3
"""Most of a pass that is not waited for."""
_ALIKE = 1.5
"""A pass takes the last one's time a token if it has at most so many times its tokens, or so many times fewer."""


@dataclass(frozen=True)
class UnderWay:
    """A pass that the device computes, or will.

    Attributes:
        began: when it was begun.
        tokens: padding included.
        due: when it is expected to end.
        timer: launches the next, if that is known.
    """

    began: float
    tokens: int
    due: float
    timer: asyncio.TimerHandle | None


class Ahead:
    """Expects of each pass that a token takes as long as in the last one. To be used on one event loop.

    Args:
        launch: called a moment before a pass is expected to end.

    Attributes:
        seconds: that the last pass took the device.
        free: when it ended.
    """

    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch
        self._tokens = 0  # of the last pass
        self.seconds = self.free = self._due = 0.0

    def begin(self, tokens: int) -> UnderWay:
        """A pass begins, behind those under way.

        Args:
            tokens: padding included.
        """
        now = time.monotonic()
        alike = self._tokens <= _ALIKE * tokens and tokens <= _ALIKE * self._tokens
        expected = self.seconds * tokens / self._tokens if alike and self._tokens else 0.0
        self._due = max(now, self._due) + expected
        timer = None
        if expected:
            wait = self._due - now - min(_SECONDS, _SHARE * expected)
            timer = asyncio.get_running_loop().call_later(wait, self._launch)
        return UnderWay(now, tokens, self._due, timer)

    def end(self, passed: UnderWay) -> None:
        """A pass has ended."""
        if passed.timer is not None:
            passed.timer.cancel()
        now = time.monotonic()
        self.seconds = now - max(passed.began, self.free)
        self.free, self._tokens = now, passed.tokens
        self._due += now - passed.due  # what follows is as late as this one was
