"""Passes of the decoder as CUDA graphs: recorded once for a size of batch, then told to the device in one call.

A pass of a 7B decoder is some two thousand kernels. Told one by one from Python, a short batch waits for its kernels to
be named, and a long one does wherever other threads of the host hold the interpreter. A graph names them all at once.
Its price is memory: what a recorded pass keeps for its way back stays reserved. The graphs of all sizes take turns in
one pool, so that the largest decides how much, and the pool is given back whenever a batch needs the memory.

Batches are padded to a few sizes (`Size.of`). A size is recorded when it has come a few times, by the request that
finds it so; that takes a second. What cannot be recorded is computed as before.

NVIDIA, CUDA C++ Programming Guide, "CUDA Graphs"; PyTorch, "CUDA semantics", on graphs and their memory.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fednano.errors import ConfigError

__all__ = ["CudaGraphs", "Decode", "Pool", "Recorded", "Size"]

log = logging.getLogger(__name__)

Decode: TypeAlias = Callable[[Tensor], Tensor]
"""Maps embeddings ``(B, L, d)`` to hidden states ``(B, L, d)``, differentiably."""

_AFTER = 3
"""Times that a size comes before it is recorded."""
_MOST = 96
_REMEMBERED = 512
_SHARE = 0.4
"""Of the memory that is free beside the model, most that graphs may hold."""
_FEW_TOKENS = 1024
"""Up to so many tokens a pass takes as long as it takes to read the weights, and padding costs nothing."""


@dataclass(frozen=True)
class Size:
    """What a batch is padded to.

    Attributes:
        samples: B.
        tokens: L.
    """

    samples: int
    tokens: int

    @property
    def places(self) -> int:
        """B L."""
        return self.samples * self.tokens

    @staticmethod
    def of(samples: int, tokens: int, longest: int) -> Size:
        """The size for a batch. Small ones go to the next power of two and by steps of an eighth of their length, so
        that few sizes serve all; of large ones, where padding costs time, each has nearly its own.

        Args:
            samples: B.
            tokens: L.
            longest: most tokens that the decoder takes.
        """
        step = 16
        if samples * tokens <= _FEW_TOKENS:
            samples = 1 << (samples - 1).bit_length()
            step = max(step, (1 << (tokens.bit_length() - 1)) // 8)
        return Size(samples, max(tokens, min(-(-tokens // step) * step, longest)))


class Recorded(Protocol):
    """A decoder's way there and back for one size."""

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``(B, L, d)`` of ``x`` ``(b, l, d)``, valid until the next call of anything in the pool."""
        ...

    def backward(self, gradient: Tensor) -> Tensor:
        """Gradient ``(b, l, d)`` in the ``x`` of the last `forward` from that in its states ``(b, l, d)``."""
        ...


class Pool(Protocol):
    """Records decoders, and holds what they share."""

    @property
    def held(self) -> int:
        """Bytes of the device that nothing else can have."""
        ...

    def record(self, decode: Decode, x: Tensor) -> Recorded:
        """Record ``decode`` for batches up to ``x`` ``(B, L, d)``."""
        ...

    def follow(self) -> None:
        """What is asked of the device now comes after the last use."""
        ...

    def used(self) -> None:
        """What was asked of the device until now belongs to this use."""
        ...

    def finish(self) -> None:
        """Wait until the device has done the last use."""
        ...


class CudaGraphs:
    """The sizes that are recorded, and those that may be.

    Args:
        decode: the decoder, whose weights are frozen.
        width: d.
        dtype: of embeddings and states.
        device: where the decoder lies.
        longest: most tokens that it takes.
        pool: makes a pool, such as `fednano.models.cuda_pool.CudaPool`.
    """

    def __init__(
        self,
        decode: Decode,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        longest: int,
        pool: Callable[[], Pool],
    ) -> None:
        self._decode, self._longest = decode, longest
        self._options = {"dtype": dtype, "device": device}
        self._width = width
        self._new_pool = pool
        self._pool = self._new_pool()
        self._recorded: OrderedDict[Size, Recorded] = OrderedDict()
        self._seen: Counter[Size] = Counter()
        self._most = _MOST
        self._largest: int | None = None  # places, once the memory has run out
        self._lock = threading.RLock()

    @property
    def held(self) -> int:
        """Bytes of the device that only recorded passes use."""
        return self._pool.held

    def __len__(self) -> int:
        return len(self._recorded)

    def has(self, samples: int, tokens: int) -> bool:
        """Whether a batch of this size is recorded, so that it needs no further memory."""
        return Size.of(samples, tokens, self._longest) in self._recorded

    @contextmanager
    def decoder(
        self, samples: int, tokens: int, needed: Callable[[int], int], free: Callable[[], int]
    ) -> Iterator[Decode | None]:
        """What to call instead of the decoder, within the ``with`` block, for one batch; ``None`` to call it itself.

        All that is made of the states, gradients included, must be asked for within the block.

        Args:
            samples: B.
            tokens: L.
            needed: bytes that a pass over so many places takes.
            free: bytes that are free now, `held` not among them.
        """
        size = Size.of(samples, tokens, self._longest)
        self._lock.acquire()
        try:
            recorded = self._recorded.get(size) or self._record(size, needed, free)
            if recorded is not None:
                self._recorded.move_to_end(size)
                self._pool.follow()
                try:
                    yield lambda x: _Replay.apply(x, recorded)  # type: ignore[no-untyped-call]
                finally:
                    self._pool.used()
        finally:
            self._lock.release()
        if recorded is None:
            yield None  # beside others' passes

    def first(self) -> None:
        """Record the smallest size, so that a decoder for which that is impossible is known at the start.

        Raises:
            ConfigError: it is impossible.
        """
        size = Size.of(1, 1, self._longest)
        try:
            self._recorded[size] = self._pool.record(self._decode, self._zeros(size))
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise ConfigError(
                f"this model's passes cannot be recorded as CUDA graphs ({why}); leave out --cuda-graphs"
            ) from error

    def let_go(self) -> bool:
        """Give the memory back, for good as far as it was more than half; whether there was any."""
        with self._lock:
            if not self._recorded:
                return False
            self._largest = max(size.places for size in self._recorded) // 2
            log.info("CUDA graphs give %.1f GB back", self.held / 1e9)
            self._drop()
            return True

    def _drop(self) -> None:
        self._pool.finish()  # a pass may still run that was launched before
        self._recorded.clear()
        self._seen.clear()
        self._pool = self._new_pool()

    def _record(self, size: Size, needed: Callable[[int], int], free: Callable[[], int]) -> Recorded | None:
        if len(self._seen) >= _REMEMBERED and size not in self._seen:
            self._seen.clear()
        self._seen[size] += 1
        if self._seen[size] != _AFTER or (self._largest is not None and size.places > self._largest):
            return None
        takes, there = needed(size.places), free()
        grows = max(takes - self.held, 0)
        if takes + grows > there or self.held + grows > _SHARE * (there + self.held):
            return None
        try:
            found = self._pool.record(self._decode, self._zeros(size))
        except Exception as error:  # whatever it is, the decoder can be told kernel by kernel
            log.warning("a pass of %d x %d is not recorded: %s", size.samples, size.tokens, error)
            # What failed in the middle may have left the pool in any state.
            self._drop()
            self._largest = size.places // 2
            return None
        log.info("recorded a pass of %d x %d; %.1f GB held", size.samples, size.tokens, self.held / 1e9)
        self._recorded[size] = found
        if len(self._recorded) > self._most:
            old, _ = self._recorded.popitem(last=False)
            del self._seen[old]
        return found

    def _zeros(self, size: Size) -> Tensor:
        x: Tensor = torch.zeros(size.samples, size.tokens, self._width, **self._options)  # type: ignore[call-overload]
        return x


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, recorded: Recorded) -> Tensor:
        ctx.recorded = recorded
        return recorded.forward(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # A copy: the next batch writes where this gradient lies.
        return ctx.recorded.backward(gradient).clone(), None
