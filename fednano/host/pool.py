"""Admission and computation: how much a host takes on at once, and where it computes.

A few worker threads compute, each with a fixed number of torch threads, in the order in which work arrives. So the
bits of what is computed do not depend on what else the host is doing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import torch

from fednano.errors import ConfigError
from fednano.host.lane import Done
from fednano.host.limits import HostLimits
from fednano.host.stats import Stats

__all__ = ["BusyError", "ComputePool"]

T = TypeVar("T")

_CARRIERS = 2
"""Threads that carry requests to a GPU and replies back while it computes: one for each way."""


class BusyError(Exception):
    """The host has taken on all it may; the caller should try again later."""


class ComputePool:
    """Bounded admission in front of a pool of worker threads.

    Args:
        limits: ``max_requests`` and ``max_buffered_bytes`` bound what is admitted.
        stats: where to count.
        workers: computations at one time.
        threads: torch threads of each computation; ``None`` leaves torch's setting alone. It is a setting of
            the whole process.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(
        self, limits: HostLimits, stats: Stats, *, workers: int = 1, threads: int | None = None
    ) -> None:
        for name, value in (("workers", workers), ("threads", 1 if threads is None else threads)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        self._limits, self._stats = limits, stats
        if threads is not None:
            torch.set_num_threads(threads)
        self.workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="language-host")
        self._carriers = ThreadPoolExecutor(_CARRIERS, thread_name_prefix="language-host-carrier")
        # A pass for each worker, and one that was launched before the last had ended.
        self._waiters = ThreadPoolExecutor(workers + 1, thread_name_prefix="language-host-waiter")

    @asynccontextmanager
    async def admit(self, nbytes: int) -> AsyncIterator[None]:
        """Hold a place for one request of ``nbytes`` of tensors, from its header to its last reply.

        Raises:
            BusyError: there is no place now.
        """
        stats, limits = self._stats, self._limits
        if stats.get("in_flight") >= limits.max_requests:
            raise BusyError(
                f"{limits.max_requests} requests are in flight, the most this host takes on; try again later"
            )
        # A lone request is always admitted: its own size has been checked before.
        if stats.get("in_flight") and stats.get("buffered_bytes") + nbytes > limits.max_buffered_bytes:
            raise BusyError(f"requests in flight hold {stats.get('buffered_bytes')} bytes; try again later")
        stats.add("in_flight")
        stats.add("buffered_bytes", nbytes)
        try:
            yield
        finally:
            stats.add("in_flight", -1)
            stats.add("buffered_bytes", -nbytes)

    async def run(self, compute: Callable[[], T]) -> T:
        """Run ``compute`` on a worker. If the caller is cancelled while it waits, it never runs."""

        def job() -> T:
            loop.call_soon_threadsafe(self._stats.add, "computed")
            began = time.monotonic()
            try:
                return compute()
            finally:
                spent = round(1000 * (time.monotonic() - began))
                loop.call_soon_threadsafe(self._stats.add, "computed_milliseconds", spent)

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, job)

    async def carry(self, work: Callable[[], T]) -> T:
        """Run ``work`` beside the workers: copies to and from a device."""
        return await asyncio.get_running_loop().run_in_executor(self._carriers, work)

    async def wait(self, done: Done) -> None:
        """Until a device has done what a worker told it; the worker is free meanwhile."""
        if done.event is not None:
            await asyncio.get_running_loop().run_in_executor(self._waiters, done.wait)

    async def close(self) -> None:
        """Drop what waits, let running computations end."""
        for executor in (self._executor, self._carriers, self._waiters):
            await asyncio.to_thread(executor.shutdown, wait=True, cancel_futures=True)
