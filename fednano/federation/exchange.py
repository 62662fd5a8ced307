"""Send requests to clients and take their replies as they come, with a deadline and a way out."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fednano.errors import Interrupted, RunError, UpdateRefused
from fednano.federation.messages import Failure, Reply, record_bytes

__all__ = ["Delivery", "Outstanding", "Stop", "exchange", "wait_for_nodes"]

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.05, 0.5
_POLL_SHARE = 0.04  # of the time waited so far: a SuperLink is asked seldom for what takes long
_DRAIN_SECONDS = 20.0
_TTL_MARGIN = 60.0


class Stop:
    """A request to end a run early: set by Ctrl-C or by an error elsewhere, watched by everything that waits."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def set(self, reason: str) -> None:
        """Ask the run to end; the first reason is kept."""
        if not self._event.is_set():
            self.reason = reason
        self._event.set()

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but not past a request to stop; true when one came."""
        return self._event.wait(seconds)


@dataclass(frozen=True)
class Delivery:
    """A client's reply, or the reason why there is none, with what it weighed on the wire.

    Attributes:
        client: name of the client that was asked.
        reply: its reply; a failure is a reply with ``failure`` set.
        bytes_up: serialised size of the reply's records; 0 when nothing came.
        leaves_bytes: the part of it that is the adapter update, Fisher included.
        seconds: from sending to receiving.
        asked: the round of the request.
    """

    client: str
    reply: Reply
    bytes_up: int
    leaves_bytes: int
    seconds: float
    asked: int = 0


class Outstanding:
    """Requests of earlier rounds that nobody has answered yet; their replies are late."""

    def __init__(self) -> None:
        self.requests: dict[str, tuple[int, float]] = {}
        """Message id to round and time of sending."""
        self.names: dict[int, str] = {}
        """Node id to client, of all that were asked."""
        self._clients: dict[str, tuple[int, float]] = {}  # name to round and time of expiry

    def holds(self, number: int) -> bool:
        """Whether a request of a round is still open."""
        return any(asked == number for asked, _ in self.requests.values())

    def busy(self, client: str) -> bool:
        """Whether a client still works on a request that has not expired."""
        return client in self._clients and time.monotonic() < self._clients[client][1]

    def leave(
        self, messages: Iterable[str], clients: Iterable[str], number: int, sent: float, ttl: float
    ) -> None:
        """Keep what a round did not wait for."""
        self.requests |= dict.fromkeys(messages, (number, sent))
        self._clients |= dict.fromkeys(clients, (number, sent + ttl))

    def take(self, message: str, client: str) -> tuple[int, float]:
        """Round and time of sending of an answered request, which is open no longer."""
        number, sent = self.requests.pop(message)
        if self._clients.get(client, (0, 0.0))[0] == number:
            del self._clients[client]
        return number, sent


def wait_for_nodes(grid: Grid, count: int, timeout: float, stop: Stop) -> list[int]:
    """Node ids of the connected clients, sorted, once there are at least ``count``.

    Raises:
        RunError: fewer than ``count`` appeared within ``timeout`` seconds.
        Interrupted: the run was asked to end.
    """
    deadline = time.monotonic() + timeout
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= count:
            return nodes
        if time.monotonic() > deadline:
            raise RunError(
                f"only {len(nodes)} of {count} clients connected within {timeout:g} s. Start the missing "
                "SuperNodes, lower 'clients', or raise 'join-timeout'."
            )
        if stop.wait(0.1):
            raise Interrupted(stop.reason)


def exchange(
    grid: Grid,
    requests: Mapping[str, tuple[int, RecordDict]],
    *,
    message_type: str,
    group: str,
    timeout: float,
    stop: Stop,
    check_names: bool = True,
    number: int = 0,
    outstanding: Outstanding | None = None,
) -> Generator[Delivery]:
    """Send one request to each client and yield what comes back, in order of arrival.

    With ``outstanding``, late replies to earlier requests are yielded, too, and requests that are unanswered at the
    deadline or when the caller closes the generator are left there.

    Args:
        grid: Flower's connection to the clients.
        requests: client name to node id and message content.
        message_type: Flower's message type, such as ``"train"``.
        group: group id of the messages, such as the round's number.
        timeout: seconds after which missing replies are given up; each is yielded as a failure.
        stop: ends the wait early.
        check_names: refuse a reply that carries another client's name.
        number: the round, for `Delivery.asked`.
        outstanding: open requests of earlier rounds.

    Raises:
        Interrupted: the run was asked to end.
    """
    started = time.monotonic()
    clients: dict[int, str] = {}
    messages = []
    for client, (node, content) in sorted(requests.items()):
        clients[node] = client
        messages.append(
            Message(
                content,
                dst_node_id=node,
                message_type=message_type,
                ttl=timeout + _TTL_MARGIN,
                group_id=group,
            )
        )
    pending = set(grid.push_messages(messages))
    del messages, requests  # a thousand clients' requests need not outlive their sending
    unanswered, late = dict(clients), outstanding or Outstanding()
    newest = started
    try:
        while pending:
            arrived = list(grid.pull_messages(pending | set(late.requests)))
            newest = time.monotonic() if arrived else newest
            for message in arrived:
                request, node = message.metadata.reply_to_message_id, message.metadata.src_node_id
                if request in late.requests:
                    client = late.names.get(node, str(node))
                    asked, sent = late.take(request, client)
                    yield _open(client, message, time.monotonic() - sent, check_names, asked)
                    continue
                pending.discard(request)
                if node in unanswered:
                    client = unanswered.pop(node)
                    yield _open(client, message, time.monotonic() - started, check_names, number)
            if not pending or time.monotonic() - started > timeout:
                break
            pause = _POLL_SHARE * (time.monotonic() - newest)
            pause = min(max(pause, _POLL_SECONDS), _LONGEST_POLL_SECONDS)
            if (not arrived and stop.wait(pause)) or stop.requested:
                _drain(grid, pending)
                raise Interrupted(stop.reason)
    finally:
        late.names |= clients
        late.leave(pending, unanswered.values(), number, started, timeout + _TTL_MARGIN)
    for client in sorted(unanswered.values()):
        reason = f"no reply within {timeout:g} s (round-timeout)"
        failed = _failed(client, "Timeout", reason)
        yield Delivery(client, failed, 0, 0, time.monotonic() - started, number)


def _drain(grid: Grid, pending: set[str]) -> None:
    """Let clients at work finish while their language host is still there; without it they would try to reach it."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    while pending and time.monotonic() < deadline:
        for message in grid.pull_messages(pending):
            pending.discard(message.metadata.reply_to_message_id)
        time.sleep(_POLL_SECONDS)


def _open(client: str, message: Message, seconds: float, check_name: bool, asked: int) -> Delivery:
    if message.has_error():
        reason = (message.error.reason or f"error code {message.error.code}").strip()
        return Delivery(client, _failed(client, "ClientCrashed", reason), 0, 0, seconds, asked)
    size = record_bytes(message.content)
    arrays = [name for name in ("leaves", "fisher") if name in message.content]
    leaves = sum(record_bytes(RecordDict({name: message.content[name]})) for name in arrays)
    try:
        reply = Reply.from_records(message.content)
        if check_name and reply.client != client:
            raise UpdateRefused(f"the node of {client} answered in the name of {reply.client}.")
    except UpdateRefused as error:
        reply = _failed(client, "UpdateRefused", str(error))
    return Delivery(client, reply, size, leaves, seconds, asked)


def _failed(client: str, kind: str, message: str) -> Reply:
    return Reply(client, 0, {}, {}, failure=Failure(kind, message))
