"""Steps of different clients in one forward and backward pass.

While all workers are busy requests wait, and a worker that becomes free takes as many waiting ones as fit into one
batch. Samples of a batch never attend to each other, so each reply equals that of the lone request up to the rounding
of matrix products of another shape. Turns go round the clients (`fednano.host.turns`).

On a GPU a pass over few tokens takes as long as one over many, since it is the reading of the weights that takes the
time. Clients that have just been answered come back in a moment; a worker that is free and finds but few tokens
therefore waits for them, a moment that is short beside the pass. Without that, clients of short steps fall into two
groups that wait for each other, each with half of the batch. Nobody waits for a client that usually stays away longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, TypeAlias, TypeVar

import torch

from fednano.errors import ConfigError, HostRefused
from fednano.host.ahead import Ahead
from fednano.host.jobs import Compute, Job
from fednano.host.lane import Done, Lane
from fednano.host.logs import event
from fednano.host.pool import ComputePool
from fednano.host.stats import Stats
from fednano.host.turns import Ask, Turns, Waiting
from fednano.models.language import LocalLLM

__all__ = ["StepBatcher", "for_caller"]

log = logging.getLogger(__name__)

_ENOUGH_TOKENS = 1024
"""With so many tokens a pass is bound by arithmetic on the GPUs of today, and more company gains little."""
_SHARE_OF_A_PASS = 0.5
_REMEMBERED_CLIENTS = 4096
_LAUNCH_SECONDS = 0.25
T = TypeVar("T")
_Found: TypeAlias = "Callable[[], Any] | Exception"


@dataclass(frozen=True)
class _Answered:
    """When a client was answered last, and how long it usually takes to come back, in seconds."""

    at: float
    gap: float = 0.0


class StepBatcher:
    """Computes steps, several requests at a time where they wait for each other anyway.

    Args:
        llm: the model.
        pool: where to compute.
        stats: counts ``batches`` and ``batched_requests``, those that shared a pass with another.
        batch_tokens: most tokens, samples times the longest, of a batch of several requests; 0 computes every request
            alone, and then the bits of a reply depend on its request alone.
        linger_seconds: longest wait for company, see above; 0 never holds a request back.

    Raises:
        ConfigError: a negative number.
    """

    def __init__(
        self,
        llm: LocalLLM,
        pool: ComputePool,
        stats: Stats,
        *,
        batch_tokens: int = 0,
        linger_seconds: float = 0.0,
    ) -> None:
        if batch_tokens < 0:
            raise ConfigError(f"batch_tokens: got {batch_tokens}, expected 0 or more")
        if not linger_seconds >= 0:
            raise ConfigError(f"linger: got {linger_seconds} s, expected 0 or more")
        self._llm, self._pool, self._stats = llm, pool, stats
        self._linger = linger_seconds if batch_tokens else 0.0
        self._lane = Lane(llm.device)
        self._ahead = Ahead(self._launch_ahead)
        self._turns = Turns(batch_tokens)
        self._running: set[asyncio.Task[None]] = set()
        self._answered: OrderedDict[str, _Answered] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def run(self, ask: Ask, client: str) -> Any:
        """What the request's job makes of its outcome. Cancelled while it waits, it is never computed.

        Args:
            ask: its sizes have been checked.
            client: whose turn it takes.

        Raises:
            HostRefused: the numbers are not acceptable.
            ConfigError: unknown objective.
        """
        request = Waiting(ask, asyncio.get_running_loop().create_future())
        if self._lane.apart:
            request.job = await self._pool.carry(lambda: self._carry(ask.prepare))
            request.since = time.monotonic()
        self._came_back(client, request.since)
        self._stats.add("waiting")
        try:
            self._turns.add(client, request)
            self._start()
            finish = await request.reply
            await self._launched()
            self._was_answered(client)
        finally:
            self._stats.add("waiting", -1)
        return await self._pool.carry(lambda: self._carry(finish)) if self._lane.apart else finish()

    def _carry(self, work: Callable[[], T]) -> T:
        with self._lane.carrying():
            return work()

    async def _launched(self) -> None:
        """Wait, a moment at most, until the pass that runs has told the device what to do on the way there.

        Until then the device waits for the interpreter, which replies would take; the way back needs none.
        """
        if not self._quiet.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAUNCH_SECONDS):
                    await self._quiet.wait()

    def _was_answered(self, client: str) -> None:
        before = self._answered.pop(client, None)
        self._answered[client] = _Answered(time.monotonic(), before.gap if before else 0.0)
        if len(self._answered) > _REMEMBERED_CLIENTS:
            self._answered.popitem(last=False)

    def _came_back(self, client: str, now: float) -> None:
        if (last := self._answered.get(client)) is not None:
            gap = now - last.at
            self._answered[client] = _Answered(last.at, (last.gap + gap) / 2 if last.gap else gap)

    def _start(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while len(self._running) < self._pool.workers:
            if (pause := self._pause()) > 0:
                self._timer = asyncio.get_running_loop().call_later(pause, self._start)
                return
            if not (batch := self._turns.take()):
                return
            self._begin(batch)

    def _begin(self, batch: list[Waiting]) -> None:
        task = asyncio.create_task(self._compute(batch))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _launch_ahead(self) -> None:
        """Begin the next pass behind the one that the device is about to end with, if enough waits for it."""
        alone = self._pool.workers == len(self._running) == 1
        if self._lane.apart and alone and self._quiet.is_set() and self._turns.tokens >= _ENOUGH_TOKENS:
            self._begin(self._turns.take())

    def _pause(self) -> float:
        """Seconds to wait for clients that were answered a moment ago; 0 to begin."""
        linger = min(self._linger, _SHARE_OF_A_PASS * self._ahead.seconds)
        if linger <= 0:
            return 0.0
        if not 0 < self._turns.tokens < _ENOUGH_TOKENS:
            return 0.0
        here = self._turns.waiting()
        now = time.monotonic()
        # Latest first: whoever was answered too long ago, and all before, are not waited for.
        recent = takewhile(lambda pair: now - pair[1].at < linger, reversed(self._answered.items()))
        if all(here.get(client) for client, last in recent if last.gap < linger):
            return 0.0
        oldest = min(request.since for requests in here.values() for request in requests)
        return max(0.0, max(self._ahead.free, oldest) + linger - now)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            self._start()

    async def _compute(self, batch: list[Waiting]) -> None:
        self._stats.add("batches")
        if len(batch) > 1:
            self._stats.add("batched_requests", len(batch))
        under_way = self._ahead.begin(
            sum(request.samples for request in batch) * max(request.longest for request in batch)
        )
        try:
            found = await self._together(batch)
        except BaseException as error:
            for request in batch:
                if not request.reply.done():
                    request.reply.set_exception(for_caller(error))
            if not isinstance(error, Exception):
                raise
            return
        finally:
            self._ahead.end(under_way)
            self._stats.add("pass_milliseconds", round(1000 * self._ahead.seconds))
        self._tell(batch)
        if self._lane.apart and self._turns.tokens >= _ENOUGH_TOKENS:
            # Nobody is waited for then: the next pass comes before these replies, see `_launched`.
            self._running -= {task for task in (asyncio.current_task(),) if task is not None}
            self._start()
        for request, outcome in zip(batch, found, strict=True):
            if request.reply.done():
                continue
            if isinstance(outcome, Exception):
                request.reply.set_exception(outcome)
            else:
                request.reply.set_result(outcome)

    def _tell(self, batch: list[Waiting]) -> None:
        event(
            "pass",
            {
                "requests": [request.ask.request for request in batch],
                "samples": sum(request.samples for request in batch),
                "tokens": sum(sum(request.ask.lengths) for request in batch),
                "ms": round(1000 * self._ahead.seconds),
            },
        )

    async def _together(self, batch: list[Waiting]) -> list[_Found]:
        """One pass for all; if that does not fit into memory, one for each."""
        try:
            return await self._run(batch)
        except (torch.OutOfMemoryError, MemoryError):
            if len(batch) == 1:
                raise
        log.warning("%d requests did not fit together; each is computed alone", len(batch))
        self._stats.add("batches_split")
        found: list[_Found] = []
        for request in batch:
            try:
                found += await self._run([request])
            except (torch.OutOfMemoryError, MemoryError) as error:
                found.append(error)
        return found

    async def _run(self, batch: list[Waiting]) -> list[_Found]:
        loop = asyncio.get_running_loop()

        def launched() -> None:
            loop.call_soon_threadsafe(self._quiet.set)

        if self._lane.apart:
            self._quiet.clear()
        try:
            found, done = await self._pool.run(lambda: self._work(batch, launched))
        finally:
            self._quiet.set()
        await self._pool.wait(done)
        return found

    def _work(self, batch: list[Waiting], launched: Callable[[], None]) -> tuple[list[_Found], Done]:
        """On a worker: one pass, or where it is computed apart, the telling of it. On a CPU, also what comes before and
        after it."""
        compute = partial(self._pass, batch[0].ask.compute, launched)
        if self._lane.apart:
            with self._lane.launching() as done:
                jobs = [request.job for request in batch if request.job]
                return [partial(job.finish, *outcome) for job, outcome in compute(jobs)], done
        found: dict[int, _Found] = {}
        made: dict[int, Job] = {}
        for index, request in enumerate(batch):
            try:
                made[index] = request.ask.prepare()
            except (HostRefused, ConfigError) as error:
                found[index] = error
        for index, (job, outcome) in zip(made, compute(list(made.values())), strict=True):
            found[index] = partial(_same, job.finish(*outcome))
        return [found[index] for index in range(len(batch))], Done()

    def _pass(
        self, compute: Compute, launched: Callable[[], None], jobs: list[Job]
    ) -> list[tuple[Job, tuple[Any, ...]]]:
        return list(zip(jobs, compute(self._llm, jobs, launched), strict=True)) if jobs else []


def _same(reply: T) -> T:
    return reply


def for_caller(error: BaseException) -> Exception:
    """What is told to whoever waits: the error, or that the host is stopping."""
    return error if isinstance(error, Exception) else RuntimeError("the host is stopping")
