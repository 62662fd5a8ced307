"""How much memory a pass over the frozen decoder takes, and into which parts a batch is cut so that it fits.

No weight has a gradient and samples never interact. So a batch may go forward and backward in parts, one after the
other: each sample gets what it would get in the whole, and only one part's activations exist at a time. That costs
nothing as long as a part fills the card. Only a sample that does not fit by itself is computed with checkpoints: as
many of the decoder's blocks as it takes keep their input alone, and compute the rest again on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["Cost", "DeviceMemory", "Memory", "Part", "PipelineMemory", "plan", "smaller"]

_MARGIN = 0.92
"""Share of the free memory that is planned with; the rest is for what fragments."""


class Memory(Protocol):
    """What can be known of a device's memory."""

    def free(self) -> int:
        """Bytes that a pass may take now."""
        ...

    def start(self) -> None:
        """Begin to watch how much is taken."""
        ...

    def taken(self) -> int:
        """Most bytes taken since `start`, beyond what was taken then."""
        ...


class DeviceMemory:
    """The memory of one CUDA device.

    Args:
        device: which.
        limit: most bytes that this process's tensors may take, weights included; ``None`` for all there are.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self._device, self._limit = device, limit
        self._before = 0

    def free(self) -> int:
        """See `Memory.free`: what the driver has, and what torch holds without using it."""
        free, _ = torch.cuda.mem_get_info(self._device)
        allocated = torch.cuda.memory_allocated(self._device)
        usable = free + torch.cuda.memory_reserved(self._device) - allocated
        return usable if self._limit is None else min(usable, self._limit - allocated)

    def start(self) -> None:
        """See `Memory.start`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def taken(self) -> int:
        """See `Memory.taken`."""
        return torch.cuda.max_memory_allocated(self._device) - self._before


class PipelineMemory:
    """The memory of several CUDA devices over which a model lies: that of the fullest counts.

    Args:
        devices: which.
        limit: most bytes on each, see `DeviceMemory`.
        passes: how many are under way at one time; each may take its part of what is free.
    """

    def __init__(self, devices: Sequence[torch.device], limit: int | None = None, *, passes: int = 1) -> None:
        self._parts = [DeviceMemory(device, limit) for device in devices]
        self._passes = passes

    def free(self) -> int:
        """See `Memory.free`."""
        return min(part.free() for part in self._parts) // self._passes

    def start(self) -> None:
        """See `Memory.start`."""
        for part in self._parts:
            part.start()

    def taken(self) -> int:
        """See `Memory.taken`."""
        return max(part.taken() for part in self._parts)


@dataclass(frozen=True)
class Cost:
    """Bytes of a pass over n tokens: ``fixed + per_token n``, or ``fixed + per_token_checkpointed n`` with checkpoints
    at every block.

    Attributes:
        fixed: whatever the tokens.
        per_token: activations of one token.
        per_token_checkpointed: the same with checkpoints.
    """

    fixed: float
    per_token: float
    per_token_checkpointed: float

    @staticmethod
    def fit(small: tuple[int, int], large: tuple[int, int], checkpointed: tuple[int, int]) -> Cost:
        """From measured (tokens, bytes): two passes without checkpoints and one with."""
        slope = max((large[1] - small[1]) / (large[0] - small[0]), 1.0)
        fixed = max(large[1] - slope * large[0], 0.0)
        return Cost(fixed, slope, min(max((checkpointed[1] - fixed) / checkpointed[0], 1.0), slope))


@dataclass(frozen=True)
class Part:
    """Samples that are computed together.

    Attributes:
        rows: which of the batch.
        checkpoints: blocks that keep their input alone.
    """

    rows: slice
    checkpoints: int = 0


def plan(lengths: Sequence[int], cost: Cost, free: int, blocks: int) -> list[Part]:
    """Cut a batch into parts of consecutive samples that fit, of about equal size.

    Args:
        lengths: tokens of each sample.
        cost: of a pass.
        free: bytes that may be taken.
        blocks: how many blocks can have checkpoints; 0 if none can.

    Raises:
        MemoryError: one sample does not fit, whatever is done.
    """
    longest, samples = max(lengths), len(lengths)
    usable = free * _MARGIN - cost.fixed
    fitting = int(usable / (cost.per_token * longest))
    if fitting >= samples:
        return [Part(slice(0, samples))]
    if fitting >= 1:
        count = -(-samples // fitting)
        size = -(-samples // count)
        return [Part(slice(at, min(at + size, samples))) for at in range(0, samples, size)]
    saved = (
        (cost.per_token - cost.per_token_checkpointed) * longest / max(blocks, 1)
    )  # by a checkpointed block
    missing = cost.per_token * longest - usable
    checkpoints = blocks + 1 if saved <= 0 else int(-(-missing // saved))
    if checkpoints > blocks:
        raise MemoryError(
            f"a sample of {longest} tokens needs {_mib(cost.fixed + cost.per_token_checkpointed * longest)} of memory "
            f"beside the model, {_mib(free)} are free now; try again later, or shorten it"
        )
    return [Part(slice(at, at + 1), checkpoints) for at in range(samples)]


def smaller(parts: Sequence[Part], samples: int, blocks: int) -> list[Part]:
    """What to try when ``parts`` did not fit after all: half as many samples at a time; at last one, with all
    checkpoints; then nothing.

    Args:
        parts: of a batch.
        samples: its samples.
        blocks: how many blocks can have checkpoints.
    """
    size = max(part.rows.stop - part.rows.start for part in parts)
    if size > 1:
        size //= 2
        return [Part(slice(at, min(at + size, samples))) for at in range(0, samples, size)]
    if min(part.checkpoints for part in parts) == blocks:
        return []
    return [Part(slice(at, at + 1), blocks) for at in range(samples)]


def _mib(nbytes: float) -> str:
    return f"{max(nbytes, 0) / 2**20:.0f} MiB"
