"""A run among enrolled sites: its server's folder, its tokens, and who its nodes are.

:class:`EnrolledGrid` stands between the server and Flower. Every request that passes carries a run token
for the site it goes to; a reply in the name of another site becomes a refusal. A site's name is the one that its node
key was enrolled under, not the one that it gives itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fednano.errors import FednanoError, Interrupted, UpdateRefused
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket, Reply
from fednano.federation.passing import PassingGrid
from fednano.runs import RunFolder
from fednano.security.audit import Auditor
from fednano.security.authority import SERVER
from fednano.security.place import ServerPlace

__all__ = ["EnrolledGrid", "auditor_of", "enrolled", "own_ticket", "place_of"]

_OWN_TOKEN_S = 30 * 86_400  # ends earlier, with its run
_MESSAGE_TTL_S = 3_600.0


def place_of(settings: Mapping[str, Any]) -> ServerPlace | None:
    """The folder of the server that a run belongs to, from the run's settings; ``None`` for a simulation."""
    folder = str(settings.get("server-dir", ""))
    return ServerPlace(Path(folder)) if folder else None


def auditor_of(settings: Mapping[str, Any]) -> Auditor:
    """Where events of a run are noted; nowhere for a simulation."""
    place = place_of(settings)
    return place.audit if place else Auditor()


def own_ticket(place: ServerPlace, run: str) -> HostTicket:
    """How the server itself reaches its host."""
    token = place.issue(run, SERVER, time.time() + _OWN_TOKEN_S)
    return HostTicket(str(place.plan["host"]), token, place.credentials.root)


@contextmanager
def enrolled(grid: Grid, config: RunConfig, folder: RunFolder, *, work: str = "run") -> Iterator[Grid]:
    """The grid that a run uses: as it is in a simulation, with tokens and names among enrolled sites.

    While the block lasts, tokens of the run are good. Its begin and what ends it are noted in the audit log, as
    ``work``: the run itself, or jobs on it.
    """
    place = place_of(config.to_mapping())
    if place is None:
        yield grid
        return
    audit = place.audit
    place.activate(folder.id)
    audit.record(f"{work} {'resumed' if config.resume else 'started'}", run=folder.id)
    try:
        yield EnrolledGrid(grid, place, folder.id)
    except (FednanoError, Interrupted) as error:
        audit.record(f"{work} ended early", run=folder.id, reason=str(error)[:500])
        raise
    else:
        audit.record(f"{work} finished", run=folder.id)
    finally:
        place.deactivate(folder.id)


class EnrolledGrid(PassingGrid):
    """A grid whose requests carry run tokens and whose replies come from whom they say.

    Args:
        inner: Flower's grid.
        place: folder of the server.
        run: id of the run.
    """

    def __init__(self, inner: Grid, place: ServerPlace, run: str) -> None:
        super().__init__(inner)
        self._place, self._run = place, run

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes of the enrolled sites that are connected."""
        known = self._sites()
        return [node for node in self._inner.get_nodes() if node.node_id in known]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, each with a token for its site."""
        known = self._sites()
        return self._inner.push_messages([self._admitted(message, known) for message in messages])

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are ready, each under the name of its site."""
        known = self._sites()
        return [self._named(message, known) for message in self._inner.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages, with tokens, and wait for all replies, checked."""
        known = self._sites()
        told = [self._admitted(message, known) for message in messages]
        return [self._named(reply, known) for reply in self._inner.send_and_receive(told, timeout=timeout)]

    def _sites(self) -> dict[int, str]:
        """Node id to site, of those that are enrolled now."""
        return {
            site.node: site.name for site in self._place.sites().values() if site.node and not site.revoked
        }

    def _admitted(self, message: Message, known: Mapping[int, str]) -> Message:
        site, task = known.get(message.metadata.dst_node_id), message.content.config_records.get("task")
        if task is not None and task.get("host-address"):
            expires = time.time() + (message.metadata.ttl or _MESSAGE_TTL_S)
            # Without one, the host says why: this site is shut out.
            task["host-token"] = self._place.issue(self._run, site, expires) if site else b""
        return message

    def _named(self, message: Message, known: Mapping[int, str]) -> Message:
        if message.has_error():
            return message
        site = known.get(message.metadata.src_node_id, "")
        try:
            reply = Reply.from_records(message.content)
        except UpdateRefused:
            return message  # whoever reads it says what is wrong with it
        if reply.client != site:
            who = f"the node enrolled as {site}" if site else "a node that is not enrolled (any more)"
            error = UpdateRefused(f"{who} answered in the name of {reply.client!r}.")
            message.content = Reply.failed(site or "unenrolled", reply.round, error).to_records()
        return message
