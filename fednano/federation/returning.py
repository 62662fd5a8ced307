"""Clients that are lost in the middle of an exchange, and come back: who is waited for, who is asked again.

Flower hands a request to a node once. A SuperNode that was killed with it comes back under the same id, without it: the
request counts as delivered, and nobody will answer. There are two signs of that. When Flower has missed a node's
heartbeats (up to a minute), it answers in the node's stead that it is gone, and drops the request. And a node that has
come back before anybody asked has another time of activation than when the request was sent.

A client may then have several requests of one exchange open at once, for it is not known whether the process that got
the first is dead or was only cut off. The first answer to any of them counts; the others are closed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

__all__ = ["MOST_REPEATS", "Roll", "connected", "is_lost", "reason_of"]

MOST_REPEATS = 3
"""How often a client is asked again in one exchange; what kills it each time would do so for ever."""

_LOST = frozenset(
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
_WHY = {
    ErrorCode.NODE_UNAVAILABLE: "its node is not connected",
    ErrorCode.MESSAGE_UNAVAILABLE: "its request or its reply was lost on the way",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its reply was lost on the way",
    ErrorCode.CLIENT_APP_CRASHED: "its process died",
}
_NOT_TAKEN = "Flower did not take its request"
_CAME_BACK = "its node went away and came back"


def is_lost(message: Message) -> bool:
    """Whether a message tells, in a client's stead, that the client or what it sent is gone."""
    return message.has_error() and message.error.code in _LOST


def reason_of(message: Message) -> str:
    """What a message of an error says, in words."""
    error = message.error
    return _WHY.get(error.code) or (error.reason or f"error code {error.code}").strip()


def connected(grid: Grid) -> dict[int, str]:
    """When each connected node was activated last; empty texts from grids whose nodes cannot go away."""
    return {node.node_id: node.last_activated_at for node in grid.get_nodes()}


@dataclass
class _Client:
    node: int
    activated: str | None
    """Of its node, when it was asked; ``None``: it was not connected."""
    open: set[str] = field(default_factory=set)
    repeats: int = 0
    why: str = ""
    """Why it is lost; empty while a request may still be answered."""
    until: float = 0.0
    """How long it is waited for when it is lost."""


class Roll:
    """Everybody who was asked in one exchange, until they have answered.

    It keeps no time: moments are whatever clock the caller has, in seconds.

    Args:
        nodes: client name to node id.
        here: nodes that are connected now, to the time of their activation.
        patience: seconds to wait for a lost client; 0 where it is waited for only as long as others are.
    """

    def __init__(self, nodes: Mapping[str, int], here: Mapping[int, str], patience: float) -> None:
        self._clients = {name: _Client(node, here.get(node)) for name, node in nodes.items()}
        self._patience = patience
        self._requests: dict[str, str] = {}

    @property
    def open(self) -> set[str]:
        """Ids of the requests that may still be answered."""
        return set(self._requests)

    @property
    def names(self) -> dict[str, str]:
        """Id of each request that may still be answered, to the client that it was sent to."""
        return dict(self._requests)

    def sent(self, client: str, request: str) -> None:
        """A request has gone to a client."""
        self._clients[client].open.add(request)
        self._requests[request] = client

    def not_sent(self, client: str, now: float) -> None:
        """Flower did not take a request to a client, which it knows no longer."""
        known = self._clients[client]
        if not known.open:
            known.why, known.until = _NOT_TAKEN, now

    def client(self, request: str) -> str | None:
        """Whose answer to a request counts; ``None`` where that client has answered another, or nobody was asked."""
        return self._requests.get(request)

    def answered(self, client: str) -> int:
        """A client has answered: its other requests count no longer. Returns how often it had been asked again."""
        gone = self._clients.pop(client)
        for request in gone.open:
            del self._requests[request]
        return gone.repeats

    def lose(self, request: str, why: str, now: float) -> None:
        """A request will not be answered; the client is lost when it has no other."""
        known = self._clients[self._requests.pop(request)]
        known.open.discard(request)
        if not known.open:
            self._lost(known, why, now)

    def returned(self, here: Mapping[int, str], now: float) -> dict[str, str]:
        """Look who is there; returns the clients that are to be asked again now, and why.

        Args:
            here: as `connected` says.
            now: the moment.
        """
        again = {}
        for name, known in self._clients.items():
            activated = here.get(known.node)
            if activated is None:
                continue
            if known.activated is None and not known.why:
                known.activated = activated  # its request waited for it
            if not known.why and activated != known.activated:
                # The old request stays open: it may have been a line that was cut, and not a process that died.
                self._lost(known, _CAME_BACK, now)
            if known.why and known.repeats < MOST_REPEATS:
                again[name] = known.why
                known.repeats += 1
                known.activated, known.why = activated, ""
        return again

    def waits(self, now: float) -> bool:
        """Whether anybody is still to be waited for."""
        return any(known.open or (known.why and now < known.until) for known in self._clients.values())

    def missing(self) -> dict[str, tuple[str, int]]:
        """Who has not answered: why it is lost, empty where nothing is known, and how often it was asked again."""
        return {name: (known.why, known.repeats) for name, known in self._clients.items()}

    def busy(self) -> set[str]:
        """Clients that may still be at work."""
        return {name for name, known in self._clients.items() if known.open}

    def _lost(self, known: _Client, why: str, now: float) -> None:
        waited_for = known.activated is not None and known.repeats < MOST_REPEATS
        known.why, known.until = why, now + self._patience if waited_for else now
