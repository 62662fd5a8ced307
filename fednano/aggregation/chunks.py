"""Working through large accumulators in pieces that fit a core's cache.

One thread does it. Two were tried: each piece is a handful of calls of some 20 microseconds, and handing
Python's lock to and fro between them costs more than the second core brings, on a busy machine tenfold.
"""

from __future__ import annotations

import mmap
import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["CHUNK", "SCRATCH", "U64", "Scratch", "zeros"]

CHUNK = 32768  # elements: the buffers stay in a core's second-level cache, and a call costs little beside its work

U64 = npt.NDArray[np.uint64]


def zeros(size: int) -> U64:
    """Zeros in pages of their own, which go back to the system when the array goes.

    From the heap, an accumulator freed at the end of a round leaves holes that the next round's tensors may not fit.
    """
    return np.frombuffer(mmap.mmap(-1, max(8 * size, 8)), np.uint64, count=size)


class Scratch(threading.local):
    """Buffers of one thread, shared by all sums, as views of the size asked for."""

    def __init__(self) -> None:
        self._views: dict[tuple[str, int], Tensor] = {}
        self._bits: dict[int, U64] = {}

    def view(self, name: str, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The first ``size`` elements of the buffer of that name, at most `CHUNK`."""
        found = self._views.get((name, size))
        if found is None:
            whole = self._views.setdefault((name, CHUNK), torch.empty(CHUNK, dtype=dtype))
            found = self._views[name, size] = whole[:size]
        return found

    def bits(self, size: int) -> U64:
        """The bit patterns of the buffer "first"."""
        found = self._bits.get(size)
        if found is None:
            found = self._bits[size] = self.view("first", size).numpy().view(np.uint64)
        return found


SCRATCH = Scratch()
