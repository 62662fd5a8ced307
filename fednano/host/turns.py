"""Steps that wait to be computed, and who is next.

Turns go round the clients, one request each, so a client that sends much cannot crowd out one that sends little. A
batch holds requests of a kind and of like lengths.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fednano.host.jobs import Compute, Job, compute_jobs

__all__ = ["Ask", "Turns", "Waiting"]

_STRETCH = 1.5
"""A sample is padded to at most this multiple of its own request's length, so padding never outweighs the gain."""


@dataclass(frozen=True)
class Ask:
    """A step as its header announces it.

    Attributes:
        objective: name of the token loss.
        want_gradient: whether to go backward.
        lengths: tokens of each sample.
        prepare: makes the job of the received bytes; raises what is wrong with them.
        request: its name, for the log.
        compute: computes such steps, several at a time.
    """

    objective: str
    want_gradient: bool
    lengths: Sequence[int]
    prepare: Callable[[], Job]
    request: str = ""
    compute: Compute = compute_jobs


@dataclass
class Waiting:
    """A step that waits.

    Attributes:
        ask: what its header announced.
        reply: makes the reply, once it is computed; done before that if its caller left.
        job: where it is brought to the device before its turn comes.
        since: when it began to wait.
    """

    ask: Ask
    reply: asyncio.Future[Callable[[], Any]]
    job: Job | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def samples(self) -> int:
        """How many it has."""
        return len(self.ask.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.ask.lengths)

    @property
    def kind(self) -> tuple[Compute, str, bool]:
        """What it shares with those that can be computed beside it."""
        return self.ask.compute, self.ask.objective, self.ask.want_gradient


class Turns:
    """Who waits. To be used on one event loop.

    Args:
        tokens: most tokens, samples times the longest, of a batch of several requests.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        # By client; the next turn is the first's.
        self._queues: OrderedDict[str, deque[Waiting]] = OrderedDict()

    def add(self, client: str, request: Waiting) -> None:
        """It waits, behind the others of its client."""
        self._queues.setdefault(client, deque()).append(request)

    def waiting(self) -> dict[str, list[Waiting]]:
        """Requests by client, without those whose callers left."""
        return {
            client: [request for request in queue if not request.reply.done()]
            for client, queue in self._queues.items()
        }

    @property
    def tokens(self) -> int:
        """That wait, padding within requests included."""
        here = self.waiting().values()
        return sum(request.samples * request.longest for requests in here for request in requests)

    def take(self) -> list[Waiting]:
        """The next batch, in turns over the clients; empty when nobody waits."""
        batch: list[Waiting] = []
        samples, shortest, longest = 0, 0, 0
        passed = 0
        while passed < len(self._queues):  # until no client has a first request that fits
            client, queue = next(iter(self._queues.items()))
            while queue and queue[0].reply.done():  # its caller left
                queue.popleft()
            if not queue:
                del self._queues[client]
                continue
            self._queues.move_to_end(client)
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
