"""The way of a request to the model's device and of its reply back.

On a GPU both run beside the computation, on a stream of the thread that carries, and only the thread waits for them.
On a CPU there is no way to go, and a worker does it all.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["Done", "Lane"]


class Done:
    """The end of what a device was told.

    Attributes:
        event: that it comes to; ``None`` where nothing is left to wait for.
    """

    def __init__(self) -> None:
        self.event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until it has come to it."""
        if self.event is not None:
            self.event.synchronize()


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
    def launching(self) -> Iterator[Done]:
        """Within the ``with`` block the device is told what to do; what is yielded waits, later, until it is done."""
        done = Done()
        if not self._cuda:
            yield done
            return
        with torch.cuda.device(self.device):
            yield done
            # By an event: the driver's other way of waiting keeps a core busy that the event loop needs.
            done.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.event.record()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What the ``with`` block asks of the device is done when it ends."""
        with self.launching() as done:
            yield
        done.wait()
