"""The run's language host: the operator's own, or one that this process starts and ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.runs import RunView

__all__ = ["open_host"]


@contextmanager
def open_host(config: RunConfig, view: RunView) -> Iterator[HostTicket]:
    """Give the run its language host, for as long as the block lasts."""
    if config.placement == "local":
        yield HostTicket()
        return
    raise NotImplementedError
