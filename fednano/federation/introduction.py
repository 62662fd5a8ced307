"""Who is there: ask every node for its name, its data and its model, before anything else is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fednano.errors import RunError
from fednano.federation.config import RunConfig
from fednano.federation.exchange import Again, Stop, exchange
from fednano.federation.forgetting import ForgettingGrid
from fednano.federation.messages import HostTicket, Instruction, Reply
from fednano.federation.phase import Leaves
from fednano.models.edge import NanoEdge
from fednano.runs import RunFolder

__all__ = ["Introduced", "introduce", "remind"]


@dataclass(frozen=True)
class Introduced:
    """A client that has said who it is.

    Attributes:
        node: its node.
        hello: what it said.
    """

    node: int
    hello: Reply


def introduce(
    grid: Grid,
    nodes: list[int],
    config: RunConfig,
    start: Leaves,
    edge: NanoEdge,
    stop: Stop,
) -> dict[str, Introduced]:
    """Ask every node who it is; returns clients by name.

    Raises:
        RunError: a client cannot take part, two share a name, or one holds another model.
    """
    hello = Instruction(config, "hello", 0, HostTicket(), False, {}, start)
    shared: dict[int, ArrayRecord] = {}
    asked = {str(node): (node, hello.to_records(shared)) for node in nodes}
    clients: dict[str, Introduced] = {}
    deliveries = exchange(
        grid,
        asked,
        message_type="query.hello",
        group="hello",
        timeout=config.join_timeout,
        stop=stop,
        check_names=False,
        again=Again(lambda _: hello.to_records(), config.join_timeout),
    )
    for delivery in deliveries:
        reply = delivery.reply
        if reply.failure is not None:
            raise RunError(f"client {reply.client} cannot take part: {reply.failure.message}")
        if reply.facts.get("edge") != edge.edge.fingerprint:
            raise RunError(
                f"client {reply.client} holds the edge weights {reply.facts.get('edge', 'unknown')[:16]}, the server "
                f"{edge.edge.fingerprint[:16]}. Give both the same model."
            )
        if reply.client in clients:
            raise RunError(
                f"two nodes call themselves {reply.client!r}. Give each SuperNode its own site name."
            )
        clients[reply.client] = Introduced(int(delivery.client), reply)
    return dict(sorted(clients.items()))


def remind(
    grid: ForgettingGrid,
    clients: dict[str, Introduced],
    config: RunConfig,
    edge: NanoEdge,
    folder: RunFolder,
    stop: Stop,
) -> dict[str, Introduced]:
    """Ask those that have something to forget again, now that the grid knows who they are.

    Raises:
        RunError: nobody has samples left.
    """
    simulated = all(client.hello.facts.get("simulated") == "True" for client in clients.values())
    due = grid.know({name: client.node for name, client in clients.items()}, simulated=simulated)
    if not due:
        return clients
    again = introduce(grid, [clients[name].node for name in due], config, edge.travelling(), edge, stop)
    clients = {**clients, **again}
    gone = [name for name, client in clients.items() if not client.hello.metrics["samples"]]
    for name in gone:
        folder.append_event("info", f"{name} has withdrawn all its samples and takes no part.")
    if len(gone) == len(clients):
        raise RunError("every client has withdrawn all its samples; there is nothing left to train on.")
    return {name: client for name, client in sorted(clients.items()) if name not in gone}
