"""A finished run and the clients that are connected now: what is needed to ask them something between runs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from flwr.app import RecordDict
from flwr.serverapp import Grid
from safetensors.torch import load_file

from fednano.errors import RunError
from fednano.federation.config import RunConfig
from fednano.federation.enrolled import enrolled, place_of
from fednano.federation.exchange import Delivery, Stop, exchange, wait_for_nodes
from fednano.federation.forgetting import ForgettingGrid
from fednano.federation.gathering import BASIS_FILE, unflatten
from fednano.federation.hosting import open_host
from fednano.federation.introduction import introduce, remind
from fednano.federation.messages import HostTicket, Instruction, record_bytes
from fednano.federation.model import build_edge, connect, use_threads
from fednano.federation.schedules import fit_rank
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.runs import RunFolder, RunView

__all__ = ["Deployment", "open_deployment", "sent_bytes"]


@dataclass(frozen=True)
class Deployment:
    """Connected clients of a finished run.

    Attributes:
        grid: reaches them, with their tombstones.
        nodes: client name to node id.
        config: the run's settings.
        ticket: how they reach the language host.
        folder: the run.
        edge: the server's NanoEdge, of the adapter's rank.
        llm: the server's own connection to the language model.
        stop: a request to end early.
        simulated: whether the clients hold parts of one data set.
    """

    grid: ForgettingGrid
    nodes: Mapping[str, int]
    config: RunConfig
    ticket: HostTicket
    folder: RunFolder
    edge: NanoEdge
    llm: LanguageModel
    stop: Stop
    simulated: bool

    def ask(
        self, instructions: Mapping[str, Instruction], *, message_type: str, group: str
    ) -> Generator[Delivery]:
        """Send each client its request; yields replies as they come, failures of those that do not answer.

        Args:
            instructions: client name to what it is asked; ticket, basis and run are filled in here.
            message_type: Flower's message type.
            group: group id of the messages.

        Raises:
            Interrupted: `stop` was set.
        """
        basis = self.edge.basis_fingerprint() if self.folder.file(BASIS_FILE).exists() else ""
        requests: dict[str, tuple[int, RecordDict]] = {}
        for name, instruction in instructions.items():
            told = replace(instruction, ticket=self.ticket, basis=basis, run=self.folder.id)
            requests[name] = (self.nodes[name], told.to_records())
        return exchange(
            self.grid,
            requests,
            message_type=message_type,
            group=group,
            timeout=self.config.round_timeout,
            stop=self.stop,
        )


def sent_bytes(instruction: Instruction) -> int:
    """Bytes of the tensors in a request."""
    content = instruction.to_records()
    return record_bytes(RecordDict({name: content[name] for name in ("leaves", "extra") if name in content}))


@contextmanager
def open_deployment(
    grid: Grid, folder: RunFolder, config: RunConfig, view: RunView, stop: Stop
) -> Iterator[Deployment]:
    """Meet the clients that are connected, and give them a language host for as long as the block lasts.

    Args:
        grid: Flower's connection to the clients.
        folder: a finished run.
        config: its settings, with this deployment's host.
        view: told where the host is.
        stop: ends the wait.

    Raises:
        RunError: nobody is connected within ``join-timeout``, or a client holds another model.
        HostError: the language host does not start, or does not answer.
    """
    use_threads(config)
    file = folder.file(BASIS_FILE)
    edge = build_edge(config, unflatten(load_file(file)) if file.exists() else None)
    fit_rank(edge, folder.load_adapter()[0])
    place = place_of(config.to_mapping())
    with ExitStack() as stack:
        sites = stack.enter_context(enrolled(grid, config, folder, work="jobs"))
        nodes = _whoever_comes(sites, config, stop)
        own = ForgettingGrid(sites, folder.path)
        clients = introduce(own, nodes, config, edge.travelling(), edge, stop)
        clients = remind(own, clients, config, edge, folder, stop)
        ticket = stack.enter_context(open_host(config, view, folder.path / "host.log", folder.id))
        llm = stack.enter_context(connect(config, ticket, place.credentials if place else None))
        simulated = all(client.hello.facts.get("simulated") == "True" for client in clients.values())
        by_name = {name: client.node for name, client in clients.items()}
        yield Deployment(own, by_name, config, ticket, folder, edge, llm, stop, simulated)


def _whoever_comes(grid: Grid, config: RunConfig, stop: Stop) -> list[int]:
    """All of the run's clients, or those that are connected when ``join-timeout`` is over."""
    try:
        return wait_for_nodes(grid, config.clients, config.join_timeout, stop)
    except RunError:
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise
        return nodes
