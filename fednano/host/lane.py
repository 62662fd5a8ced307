"""The way of a request to the model's device and of its reply back.

On a GPU both run beside the computation, on a stream of the thread that carries, and only the thread waits for them.
On a CPU there is no way to go, and a worker does it all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Lane"]


class Lane:
    """To one device and back.

    Args:
        device: of the model.

    Attributes:
        apart: whether carrying and computing are done by different threads.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"
        self.apart = self._cuda
        self._streams = threading.local()

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """What the ``with`` block asks of the device is done when it ends, and waits for no computation before."""
        if not self._cuda:
            yield
            return
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams.own):
            yield
            self._streams.own.synchronize()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What the ``with`` block asks of the device is done when it ends."""
        if not self._cuda:
            yield
            return
        with torch.cuda.device(self.device):
            try:
                yield
            finally:
                # By an event: the driver's other way of waiting keeps a core busy that the event loop needs.
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record()
                done.synchronize()
