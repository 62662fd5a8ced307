"""Send requests to clients and take their replies as they come, with a deadline and a way out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fednano.errors import Interrupted, RunError, UpdateRefused
from fednano.federation.messages import Failure, Reply, record_bytes
from fednano.federation.returning import Roll, connected, is_lost, reason_of

__all__ = ["Again", "Delivery", "Outstanding", "Stop", "exchange", "wait_for_nodes"]

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.05, 0.5
_POLL_SHARE = 0.04  # of the time waited so far: a SuperLink is asked seldom for what takes long
_DRAIN_SECONDS = 20.0
_TTL_MARGIN = 60.0
_LOOK_SECONDS = 2.0  # between two looks at who is connected


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
        repeats: how often the client was asked again, after it was lost.
    """

    client: str
    reply: Reply
    bytes_up: int
    leaves_bytes: int
    seconds: float
    asked: int = 0
    repeats: int = 0


@dataclass(frozen=True)
class Again:
    """How clients that are lost in the middle of an exchange are asked again when they come back.

    Attributes:
        request: makes a client's request anew.
        patience: seconds for which a lost client is waited for. One that was not connected when it was asked is not;
            nor is anybody with 0. Who comes back while the exchange waits for others is asked again all the same.
        tell: is told which client is asked again, and why.
    """

    request: Callable[[str], RecordDict]
    patience: float
    tell: Callable[[str, str], None] = lambda client, why: None


class Outstanding:
    """Requests of earlier rounds that nobody has answered yet; their replies are late."""

    def __init__(self) -> None:
        self.requests: dict[str, tuple[str, int, float]] = {}
        """Message id to client, round and time of sending."""
        self.arrived: deque[Message] = deque()
        """Replies that had come when a round was over with the one before them. Flower gives each out once."""
        self._clients: dict[str, tuple[int, float]] = {}  # name to round and time of expiry

    def holds(self, number: int) -> bool:
        """Whether a request of a round is still open."""
        return any(asked == number for _, asked, _ in self.requests.values())

    def busy(self, client: str) -> bool:
        """Whether a client still works on a request that has not expired."""
        return client in self._clients and time.monotonic() < self._clients[client][1]

    def leave(
        self, messages: Mapping[str, str], clients: Collection[str], number: int, sent: float, ttl: float
    ) -> None:
        """Keep what a round did not wait for: message id to client, and the clients that may be at work."""
        self.requests |= {message: (client, number, sent) for message, client in messages.items()}
        self._clients |= dict.fromkeys(clients, (number, sent + ttl))

    def take(self, message: str) -> tuple[str, int, float]:
        """Client, round and time of sending of an answered request. No request of that client and round is open now."""
        client, number, sent = self.requests[message]
        self.requests = {k: v for k, v in self.requests.items() if v[:2] != (client, number)}
        if self._clients.get(client, (0, 0.0))[0] == number:
            del self._clients[client]
        return client, number, sent


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
    again: Again | None = None,
) -> Generator[Delivery]:
    """Send one request to each client and yield what comes back, in order of arrival, at most once for each client.

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
        again: how clients that are lost meanwhile are asked again; without it, each of them is a failure at once.

    Raises:
        Interrupted: the run was asked to end.
    """
    started, late = time.monotonic(), outstanding or Outstanding()
    nodes = {client: node for client, (node, _) in requests.items()}
    roll = Roll(nodes, connected(grid) if again else {}, again.patience if again else 0.0)
    outbox = _Outbox(grid, nodes, message_type, group, started + timeout + _TTL_MARGIN, roll)
    outbox.send({client: content for client, (_, content) in requests.items()})
    del requests  # a thousand clients' requests need not outlive their sending
    newest, look_at = started, started + _LOOK_SECONDS
    try:
        while roll.waits(time.monotonic()):
            wanted = roll.open | set(late.requests)
            late.arrived.extend(grid.pull_messages(wanted) if wanted else ())
            arrived = bool(late.arrived)
            newest = time.monotonic() if arrived else newest
            while late.arrived:
                message = late.arrived.popleft()
                request = message.metadata.reply_to_message_id
                client = roll.client(request)
                if request in late.requests:
                    name, asked, sent = late.take(request)
                    yield _open(name, message, time.monotonic() - sent, check_names, asked)
                elif client and again and is_lost(message):
                    roll.lose(request, reason_of(message), newest)
                    look_at = newest
                elif client:  # else it has answered another request
                    repeats = roll.answered(client)
                    yield _open(client, message, time.monotonic() - started, check_names, number, repeats)
            now = time.monotonic()
            if again and look_at <= now <= started + timeout:
                outbox.repeat(again, now)
                look_at = now + _LOOK_SECONDS
            if now - started > timeout or not roll.waits(now):
                break
            pause = _POLL_SHARE * (time.monotonic() - newest)
            pause = min(max(pause, _POLL_SECONDS), _LONGEST_POLL_SECONDS)
            if (not arrived and stop.wait(pause)) or stop.requested:
                _drain(grid, roll.open)
                raise Interrupted(stop.reason)
    finally:
        done = {roll.client(message.metadata.reply_to_message_id) for message in late.arrived}
        late.leave(roll.names, roll.busy() - done, number, started, timeout + _TTL_MARGIN)
    yield from _missing(roll, timeout, time.monotonic() - started, number)


@dataclass(frozen=True)
class _Outbox:
    """Sends the requests of one exchange; what is sent is in its roll."""

    grid: Grid
    nodes: Mapping[str, int]
    message_type: str
    group: str
    expires: float
    roll: Roll

    def send(self, contents: Mapping[str, RecordDict]) -> None:
        """One request to each client."""
        now = time.monotonic()
        messages = {
            client: Message(
                content, self.nodes[client], self.message_type, ttl=self.expires - now, group_id=self.group
            )
            for client, content in sorted(contents.items())
        }
        taken = set(self.grid.push_messages(list(messages.values())))
        for client, message in messages.items():
            if message.metadata.message_id in taken:
                self.roll.sent(client, message.metadata.message_id)
            else:
                self.roll.not_sent(client, now)

    def repeat(self, again: Again, now: float) -> None:
        """Ask those again that were lost and are back."""
        back = self.roll.returned(connected(self.grid), now)
        for client, why in back.items():
            again.tell(client, why)
        if back:
            self.send({client: again.request(client) for client in back})


def _missing(roll: Roll, timeout: float, seconds: float, number: int) -> Generator[Delivery]:
    """A failure for each client that has not answered."""
    for client, (why, repeats) in sorted(roll.missing().items()):
        kind, reason = "Timeout", f"no reply within {timeout:g} s (round-timeout)"
        if why:
            kind, reason = "NodeLost", f"{why}, and it was not back in time (rejoin-timeout)"
        if repeats:
            reason += f"; it was asked {repeats + 1} times"
        yield Delivery(client, _failed(client, kind, reason), 0, 0, seconds, number, repeats)


def _drain(grid: Grid, pending: set[str]) -> None:
    """Let clients at work finish while their language host is still there; without it they would try to reach it."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    while pending and time.monotonic() < deadline:
        for message in grid.pull_messages(pending):
            pending.discard(message.metadata.reply_to_message_id)
        time.sleep(_POLL_SECONDS)


def _open(
    client: str, message: Message, seconds: float, check_name: bool, asked: int, repeats: int = 0
) -> Delivery:
    if message.has_error():
        kind = "NodeLost" if is_lost(message) else "ClientCrashed"
        return Delivery(client, _failed(client, kind, reason_of(message)), 0, 0, seconds, asked, repeats)
    size = record_bytes(message.content)
    arrays = [name for name in ("leaves", "fisher") if name in message.content]
    leaves = sum(record_bytes(RecordDict({name: message.content[name]})) for name in arrays)
    try:
        reply = Reply.from_records(message.content)
        if check_name and reply.client != client:
            raise UpdateRefused(f"the node of {client} answered in the name of {reply.client}.")
    except UpdateRefused as error:
        reply = _failed(client, "UpdateRefused", str(error))
    return Delivery(client, reply, size, leaves, seconds, asked, repeats)


def _failed(client: str, kind: str, message: str) -> Reply:
    return Reply(client, 0, {}, {}, failure=Failure(kind, message))
