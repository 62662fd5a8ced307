"""CUDA graphs of decoders in one pool of the device's memory. `fednano.models.cuda_graphs` decides about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fednano.models.cuda_graphs import Decode, Recorded

__all__ = ["CudaPool"]


class CudaPool:
    """One pool of memory for the graphs of all sizes; see `Pool`.

    They may share it because no two are replayed at a time, and each is done with before the next begins.
    """

    def __init__(self) -> None:
        self._handle: Any = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = (
            None  # one for all: memory is free again on its own stream only
        )
        self._last: torch.cuda.Event | None = None
        self.held = 0

    def record(self, decode: Decode, x: Tensor) -> Recorded:
        """See `Pool.record`.

        Args:
            decode: the decoder.
            x: ``(B, L, d)`` zeros.

        Raises:
            RuntimeError: the decoder asks for what a graph cannot hold, or the memory does not suffice.
        """
        with torch.cuda.device(x.device), torch.enable_grad():
            x.requires_grad_()
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            own = self._stream
            own.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(own):
                for _ in range(2):  # compiles, tunes and allocates what must not be recorded
                    torch.autograd.grad(out := decode(x), x, torch.zeros_like(out))
                del out
            own.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            there, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            # Other threads copy requests meanwhile: only this one must keep to what can be recorded.
            how: dict[str, Any] = {
                "pool": self._handle,
                "stream": own,
                "capture_error_mode": "thread_local",
            }
            with torch.cuda.graph(there, **how):
                states = decode(x)
            gradient = torch.zeros_like(states)
            with torch.cuda.graph(back, **how):
                (found,) = torch.autograd.grad(states, x, gradient)
            torch.cuda.current_stream().wait_stream(own)
            self.held += max(torch.cuda.memory_reserved() - before, 0)
            return _Graphs(there, back, x.detach(), states.detach(), gradient, found)

    def follow(self) -> None:
        """See `Pool.follow`."""
        if self._last is not None:
            self._last.wait()

    def used(self) -> None:
        """See `Pool.used`."""
        self._last = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._last.record()

    def finish(self) -> None:
        """See `Pool.finish`."""
        if self._last is not None:
            self._last.synchronize()


@dataclass(frozen=True)
class _Graphs:
    """See `Recorded`. All tensors are ``(B, L, d)`` and stay where the graphs found them."""

    there: torch.cuda.CUDAGraph
    back: torch.cuda.CUDAGraph
    x: Tensor
    states: Tensor
    gradient: Tensor
    found: Tensor

    def forward(self, x: Tensor) -> Tensor:
        _fill(self.x, x)
        self.there.replay()
        return self.states[: x.shape[0], : x.shape[1]]

    def backward(self, gradient: Tensor) -> Tensor:
        _fill(self.gradient, gradient)
        self.back.replay()
        return self.found[: gradient.shape[0], : gradient.shape[1]]


def _fill(whole: Tensor, part: Tensor) -> None:
    """Write ``part`` ``(b, l, d)`` over ``whole`` ``(B, L, d)``, zeros elsewhere: nothing of the last batch stays."""
    if whole.shape != part.shape:
        whole.zero_()
    whole[: part.shape[0], : part.shape[1]].copy_(part)
