"""Working through large accumulators in pieces that fit a core's cache, on several threads."""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CHUNK", "SCRATCH", "U64", "Scratch", "walk", "zeros"]

CHUNK = (
    16384  # elements: a thread's buffers stay in its core's cache, and a call costs little beside its work
)

U64 = npt.NDArray[np.uint64]
_T = TypeVar("_T")


def zeros(size: int) -> U64:
    """Zeros in pages of their own, which go back to the system when the array goes.

    From the heap, an accumulator freed at the end of a round leaves holes that the next round's tensors may not fit.
    """
    return np.frombuffer(mmap.mmap(-1, max(8 * size, 8)), np.uint64, count=size)


class Scratch(threading.local):
    """Buffers of one thread, shared by all sums: two of `CHUNK` doubles, with their bit patterns, and one of floats."""

    def __init__(self) -> None:
        self.first = torch.empty(CHUNK, dtype=torch.float64)
        self.first_bits: U64 = self.first.numpy().view(np.uint64)
        self._second: torch.Tensor | None = None
        self._narrow: torch.Tensor | None = None

    @property
    def second(self) -> Tensor:
        """The second buffer of doubles, made when first needed."""
        if self._second is None:
            self._second = torch.empty(CHUNK, dtype=torch.float64)
        return self._second

    @property
    def narrow(self) -> Tensor:
        """The buffer of floats, made when first needed."""
        if self._narrow is None:
            self._narrow = torch.empty(CHUNK, dtype=torch.float32)
        return self._narrow


SCRATCH = Scratch()


@functools.cache
def _helpers(process: int, count: int) -> ThreadPoolExecutor:
    """Threads beside the caller's own; by process, because threads do not survive a fork."""
    return ThreadPoolExecutor(count, thread_name_prefix="fednano-sum")


def walk(chunks: Sequence[_T], work: Callable[[_T], None]) -> None:
    """Do the work on every chunk, on as many threads as torch uses: chunks are disjoint, so the bits are the same."""
    threads = min(torch.get_num_threads(), len(chunks) // 4, 4)
    if threads < 2:
        for chunk in chunks:
            work(chunk)
        return

    def share(part: Sequence[_T]) -> None:
        for chunk in part:
            work(chunk)

    bounds = [len(chunks) * k // threads for k in range(threads + 1)]
    parts = [chunks[a:b] for a, b in itertools.pairwise(bounds)]
    waiting = [_helpers(os.getpid(), threads - 1).submit(share, part) for part in parts[1:]]
    share(parts[0])
    for future in waiting:
        future.result()
