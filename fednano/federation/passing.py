"""What grids that stand before Flower's have in common."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

__all__ = ["PassingGrid"]


class PassingGrid(Grid):
    """A grid before another one; which nodes and messages pass, and how, is for its subclasses to say.

    Args:
        inner: Flower's grid, or another that stands before it.
    """

    def __init__(self, inner: Grid) -> None:
        self._inner = inner

    def set_run(self, run: Run) -> None:
        """Take over a run's description."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The clients that are connected, and since when."""
        return self._inner.get_nodes()

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients."""
        return [node.node_id for node in self.get_nodes()]
