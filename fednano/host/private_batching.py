"""The way back of steps whose labels stay with their clients: together, where they went there together.

Clients that got their hidden states at the same time send the gradients at about the same time. The first that comes
waits for the others, at most as long as the way there took; who comes later than that is computed again alone, which
costs it one pass more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fednano.host.batching import for_caller
from fednano.host.private_compute import Graphs, Group, Half
from fednano.host.stats import Stats

__all__ = ["Halves"]

_LEAST, _MOST = 0.01, 0.25
"""Bounds in seconds on the wait for others."""
_GRACE = 2.0
"""Whoever has not been sent its hidden states this long after the first of its group has left before."""


@dataclass
class _Meeting:
    """Of a group whose members come back.

    Attributes:
        members: how many there are.
        begun: how many have been sent their hidden states.
        left: how many have all they came for, or have gone.
        grace: after which ``members`` is no more than have begun.
        here: gradients that wait, and who waits for what becomes of them.
        timer: ends the wait.
        over: the group's graph has been used.
    """

    members: int
    begun: int = 0
    left: int = 0
    grace: asyncio.TimerHandle | None = None
    here: list[tuple[Half, Tensor, asyncio.Future[Tensor]]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    over: bool = False

    @property
    def complete(self) -> bool:
        """Whether all are here who may still come."""
        return bool(self.here) and len(self.here) >= self.members - self.left


class Halves:
    """Second halves of steps. To be used on one event loop.

    Args:
        run: runs a function on a worker and waits for the device.
        graphs: where the groups' graphs are counted.
        stats: counts ``private_step_replayed``, the steps whose way there was computed again, and
            ``private_step_together``, those that went back with others.
    """

    def __init__(
        self, run: Callable[[Callable[[], Any]], Awaitable[Any]], graphs: Graphs, stats: Stats
    ) -> None:
        self._run, self._graphs, self._stats = run, graphs, stats
        self._meetings: dict[int, _Meeting] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, half: Half) -> None:
        """A client has been sent its hidden states, and may come back."""
        group = half.group
        if group is None:
            return
        meeting = self._meetings.get(id(group))
        if meeting is None:
            meeting = self._meetings[id(group)] = _Meeting(group.clients)
            if group.step.kept:  # not before: the graph of callers that have all left goes with them
                self._graphs.add(group.step, group.clients)
            if group.clients > 1:
                loop = asyncio.get_running_loop()
                meeting.grace = loop.call_later(_GRACE, self._count, group, meeting)
        meeting.begun += 1
        meeting.members = max(meeting.members, meeting.begun)

    def leave(self, half: Half) -> None:
        """A client has got all it came for, or left."""
        group = half.group
        meeting = self._meetings.get(id(group))
        if group is None or meeting is None:
            return
        meeting.here = [each for each in meeting.here if each[0] is not half]
        meeting.left += 1
        self._look(group, meeting)

    async def backward(self, half: Half, gradient: Tensor) -> Tensor:
        """The gradient ``(B, L, d)`` in a half's embeddings from that ``(n, d)`` in its hidden states.

        Raises:
            MemoryError, torch.OutOfMemoryError: it does not fit into memory, not even alone.
        """
        group = half.group
        assert group is not None
        meeting = self._meetings[id(group)]
        if meeting.over:
            return await self._alone(half, gradient)
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        meeting.here.append((half, gradient, answer))
        self._look(group, meeting)
        if not meeting.over and meeting.timer is None:
            wait = min(max(group.seconds, _LEAST), _MOST)
            meeting.timer = asyncio.get_running_loop().call_later(wait, self._go, group, meeting)
        try:
            return await answer
        except (torch.OutOfMemoryError, MemoryError):
            if group.clients == 1:
                raise
            return await self._alone(half, gradient)

    def _count(self, group: Group, meeting: _Meeting) -> None:
        """Do not wait for those whose callers left before they were answered."""
        meeting.members = meeting.begun
        self._look(group, meeting)

    def _look(self, group: Group, meeting: _Meeting) -> None:
        """Go if there is nobody to wait for; forget the group when all have left."""
        if meeting.complete:
            self._go(group, meeting)
        if meeting.left >= meeting.members:
            for timer in (meeting.timer, meeting.grace):
                if timer is not None:
                    timer.cancel()
            self._graphs.remove(group.step)
            group.step.forget()
            self._meetings.pop(id(group), None)

    def _go(self, group: Group, meeting: _Meeting) -> None:
        if meeting.over:
            return
        meeting.over = True
        if meeting.timer is not None:
            meeting.timer.cancel()
        here = [each for each in meeting.here if not each[2].done()]
        if here:
            task = asyncio.get_running_loop().create_task(self._back(group, here))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _back(self, group: Group, here: list[tuple[Half, Tensor, asyncio.Future[Tensor]]]) -> None:
        self._graphs.remove(group.step)
        try:
            found = await self._run(lambda: group.backward([(half, own) for half, own, _ in here]))
        except BaseException as error:
            for _, _, answer in here:
                if not answer.done():
                    answer.set_exception(for_caller(error))
            if not isinstance(error, Exception):
                raise
            return
        self._stats.add("private_step_replayed", group.step.replayed and len(here))
        if len(here) > 1:
            self._stats.add("private_step_together", len(here))
        for (_, _, answer), gradient in zip(here, found, strict=True):
            if not answer.done():
                answer.set_result(gradient)

    async def _alone(self, half: Half, gradient: Tensor) -> Tensor:
        self._stats.add("private_step_replayed")
        found: Tensor = await self._run(lambda: half.step.backward(gradient))
        return found
