"""Steps of different clients in one forward and backward pass.

A request that finds a free worker is computed at once. While all workers are busy requests wait, and a worker that
becomes free takes as many waiting ones as fit into one batch: no request is ever held back in the hope of company.
Samples of a batch never attend to each other, so each reply equals that of the lone request up to the rounding of
matrix products of another shape.

Turns go round the clients, one request each, so a client that sends much cannot crowd out one that sends little.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from dataclasses import dataclass

import torch

from fednano.errors import ConfigError
from fednano.host import codec
from fednano.host.compute import StepReply, compute_step, compute_steps
from fednano.host.pool import ComputePool
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.stats import Stats
from fednano.models.language import LocalLLM

__all__ = ["StepBatcher"]

log = logging.getLogger(__name__)

_STRETCH = 1.5
"""A sample is padded to at most this multiple of its own request's length, so padding never outweighs the gain."""


@dataclass
class _Waiting:
    header: pb.StepHeader
    buffer: codec.Assembler
    reply: asyncio.Future[StepReply]

    @property
    def samples(self) -> int:
        return len(self.header.embeds.lengths)

    @property
    def longest(self) -> int:
        return max(self.header.embeds.lengths)

    @property
    def kind(self) -> tuple[str, bool]:
        return self.header.objective, self.header.want_gradient


class StepBatcher:
    """Computes steps, several requests at a time where they wait for each other anyway.

    Args:
        llm: the model.
        pool: where to compute.
        stats: counts ``batches`` and ``batched_requests``, those that shared a pass with another.
        batch_tokens: most tokens, samples times the longest, of a batch of several requests; 0 computes every request
            alone, and then the bits of a reply depend on its request alone.

    Raises:
        ConfigError: a negative number.
    """

    def __init__(self, llm: LocalLLM, pool: ComputePool, stats: Stats, *, batch_tokens: int = 0) -> None:
        if batch_tokens < 0:
            raise ConfigError(f"batch_tokens: got {batch_tokens}, expected 0 or more")
        self._llm, self._pool, self._stats, self._tokens = llm, pool, stats, batch_tokens
        self._waiting: OrderedDict[str, deque[_Waiting]] = (
            OrderedDict()
        )  # by client; the next turn is the first's
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, header: pb.StepHeader, buffer: codec.Assembler, client: str) -> StepReply:
        """Losses, and the gradient if wanted, of one request. Cancelled while it waits, it is never computed.

        Args:
            header: of the request; its sizes have been checked.
            buffer: embeddings and labels.
            client: whose turn it takes.

        Raises:
            HostRefused: the numbers are not acceptable.
            ConfigError: unknown objective.
        """
        if not self._tokens:
            return await self._pool.run(lambda: compute_step(self._llm, header, buffer))
        request = _Waiting(header, buffer, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(client, deque()).append(request)
        self._start()
        return await request.reply

    def _start(self) -> None:
        while len(self._running) < self._pool.workers and (batch := self._take()):
            task = asyncio.create_task(self._compute(batch))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            self._start()

    def _take(self) -> list[_Waiting]:
        """The next batch, in turns over the clients; empty when nobody waits."""
        batch: list[_Waiting] = []
        samples, shortest, longest = 0, 0, 0
        passed = 0
        while passed < len(self._waiting):  # until no client has a first request that fits
            client, queue = next(iter(self._waiting.items()))
            while queue and queue[0].reply.done():  # its caller left
                queue.popleft()
            if not queue:
                del self._waiting[client]
                continue
            self._waiting.move_to_end(client)
            request = queue[0]
            low, high = min(shortest or request.longest, request.longest), max(longest, request.longest)
            fits = not batch or (
                request.kind == batch[0].kind
                and high <= _STRETCH * low
                and (samples + request.samples) * high <= self._tokens
            )
            if not fits:
                passed += 1
                continue
            batch.append(queue.popleft())
            samples, shortest, longest, passed = samples + request.samples, low, high, 0
        return batch

    async def _compute(self, batch: list[_Waiting]) -> None:
        self._stats.add("batches")
        if len(batch) > 1:
            self._stats.add("batched_requests", len(batch))
        requests = [(request.header, request.buffer) for request in batch]
        try:
            try:
                replies = await self._pool.run(lambda: compute_steps(self._llm, requests))
            except (torch.OutOfMemoryError, MemoryError):
                if len(batch) == 1:
                    raise
                log.warning("%d requests did not fit together; each is computed alone", len(batch))
                self._stats.add("batches_split")
                replies = [
                    (await self._pool.run(lambda one=one: compute_steps(self._llm, [one])))[0]  # type: ignore[misc]
                    for one in requests
                ]
        except BaseException as error:
            for request in batch:
                if not request.reply.done():
                    request.reply.set_exception(_for_caller(error))
            if not isinstance(error, Exception):
                raise
            return
        for request, reply in zip(batch, replies, strict=True):
            if request.reply.done():
                continue
            if isinstance(reply, Exception):
                request.reply.set_exception(reply)
            else:
                request.reply.set_result(reply)


def _for_caller(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError("the host is stopping")
