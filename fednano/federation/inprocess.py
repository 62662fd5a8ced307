"""Flower clients in this process: a :class:`flwr.serverapp.Grid` without SuperLink and without Ray.

For runs so small that starting Ray costs more than training, and for tests. The same ClientApp handles the same
messages, each serialised and parsed again, so nothing can pass by reference that could not cross a network.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["InProcessGrid"]

_RUN_ID = 1
_CRASHED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class InProcessGrid(Grid):
    """Run each message's ClientApp in one worker thread, in the order of sending.

    Args:
        client_app: the app that every client runs.
        clients: number of clients; each gets ``partition-id`` and ``num-partitions`` as its node configuration.
    """

    def __init__(self, client_app: ClientApp, clients: int) -> None:
        self._app = client_app
        self._contexts = {
            node: Context(
                run_id=_RUN_ID,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": clients},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, clients + 1)
        }
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="client")
        self._running: dict[str, Future[Message]] = {}
        self._run = Run.create_empty(_RUN_ID)
        # Flower's Message reads who speaks from here; its own simulation engine sets it the same way.
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = _RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Take over a run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A new message, as ``Message(...)`` makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for their clients."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            message.metadata.__dict__["_run_id"] = _RUN_ID
            self._running[message.metadata.message_id] = self._pool.submit(self._handle, message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are ready, each once."""
        ready = [key for key in message_ids if key in self._running and self._running[key].done()]
        return [self._running.pop(key).result() for key in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Queue messages and wait for all replies."""
        futures = [self._running[key] for key in self.push_messages(messages)]
        return [future.result(timeout) for future in futures]

    def close(self) -> None:
        """Drop what is queued and wait for the client at work to finish."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _handle(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            # What the client reads is its own copy, and goes with it: of a thousand requests none is kept twice.
            received = copy(message)
            received.content = _through_the_wire(message.content)
            reply = self._app(received, context)
            reply.content = _through_the_wire(reply.content)
        except Exception as error:  # whatever a client raises becomes its reply, as in Flower's own runtimes
            return Message(Error(code=_CRASHED, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        return reply


def _through_the_wire(content: RecordDict) -> RecordDict:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    parts = {key: part.deflate() for key, part in get_all_nested_objects(content).items()}
    return _inflate(content.object_id, parts)


def _inflate(object_id: str, parts: dict[str, bytes]) -> RecordDict:
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    inflated = inflate_object_from_contents(object_id, parts)
    assert isinstance(inflated, RecordDict)
    return inflated
