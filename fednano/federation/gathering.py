"""Adapters whose frozen basis comes from the clients' gradients: gather once, compute once, ship once.

Before the first round every client sends the gradient, at the untuned model, of its loss in each stream's full
``(d, d)`` change, summed over some of its samples. The server sums these in float64, computes the basis and ships it;
from then on only the small trained leaves travel. A client keeps the basis on its disk under its fingerprint, so that a
process started later finds it.

That one gradient sum tells more about a client's data than a low-rank update does, see `fednano.adapters.LoRASB`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from safetensors.torch import load_file, save_file
from torch import Tensor

from fednano.adapters import Dense, combine_gradients
from fednano.errors import RunError
from fednano.federation.config import RunConfig
from fednano.federation.exchange import Again, Delivery, Stop, exchange
from fednano.federation.messages import HostTicket, Instruction
from fednano.federation.model import put_adapters
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LanguageModel
from fednano.runs import RunFolder
from fednano.training.data import ClientData

__all__ = ["BASIS_FILE", "BasisStore", "client_gradients", "settle_basis", "statistics", "unflatten"]

BASIS_FILE = "basis.safetensors"
"""Name, in the run folder, of a basis that cannot be computed again."""


def client_gradients(
    edge: EdgePart, llm: LanguageModel, data: ClientData, indices: list[int], config: RunConfig
) -> dict[str, Tensor]:
    """One client's part.

    Args:
        edge: the frozen edge.
        llm: the language model, here or on a host.
        data: the client's samples.
        indices: which of them to use.
        config: streams, seed and batch size.

    Returns:
        Stream to ``(d, d)`` float32: the gradient of the summed sample losses.
    """
    probe = NanoEdge(edge, dict.fromkeys(config.stream_names, Dense()), seed=config.seed)
    for start in range(0, len(indices), config.batch_size):
        batch = probe(*data.batch(indices[start : start + config.batch_size]))
        llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).sum().backward()  # type: ignore[no-untyped-call]
    found = {}
    for stream in probe.layers:
        gradient = probe.layer(stream).theta["D"].grad
        # A stream that no sample uses, such as the image stream of text data, has had no influence.
        found[stream] = torch.zeros_like(probe.layer(stream).theta["D"]) if gradient is None else gradient
    return {stream: gradient.detach().cpu() for stream, gradient in found.items()}


def statistics(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The clients' parts, by client, summed in the order of the names: stream to ``{"gradient": (d, d)}`` float64.

    Raises:
        RunError: a part is not finite, or all gradients are zero.
    """
    for client, part in parts.items():
        for stream, gradient in part.items():
            if not bool(torch.isfinite(gradient).all()):
                raise RunError(
                    f"client {client} sent a gradient of the {stream} stream that is not finite, so no basis can be "
                    "made of it. Check that client's data, or choose an adapter without gathered gradients."
                )
    combined = combine_gradients(
        [{s: {"gradient": g} for s, g in parts[client].items()} for client in sorted(parts)]
    )
    for stream, found in combined.items():
        if not bool(found["gradient"].any()):
            raise RunError(
                f"the gathered gradient of the {stream} stream is zero: no sample uses that stream. Leave it out of "
                "'streams', or choose an adapter without gathered gradients."
            )
    return combined


def unflatten(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``{"image.A": ...}`` to ``{"image": {"A": ...}}``."""
    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        stream, _, leaf = name.partition(".")
        nested.setdefault(stream, {})[leaf] = tensor
    return nested


class BasisStore:
    """Shipped bases of a site, on its disk.

    Args:
        folder: where; created when something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _file(self, fingerprint: str) -> Path:
        return self._folder / f"basis-{fingerprint}.safetensors"

    def save(self, fingerprint: str, basis: Mapping[str, Tensor]) -> None:
        """Keep a basis, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        target = self._file(fingerprint)
        partial = target.with_suffix(".part")
        save_file({name: value.contiguous() for name, value in basis.items()}, partial)
        partial.replace(target)

    def load(self, fingerprint: str) -> dict[str, Tensor]:
        """A basis kept before.

        Raises:
            RunError: it is not there.
        """
        try:
            return load_file(self._file(fingerprint))
        except (OSError, ValueError) as error:
            raise RunError(
                f"this client does not have the adapters' basis {fingerprint[:16]}: its cache was emptied since the "
                "run began. Continue the run with --resume; the basis is shipped again then."
            ) from error


def settle_basis(
    grid: Grid,
    nodes: Mapping[str, int],
    config: RunConfig,
    ticket: HostTicket,
    edge: NanoEdge,
    folder: RunFolder,
    stop: Stop,
) -> NanoEdge:
    """Give the server and all clients the same gathered basis: made now, or, in a resumed run, the one made then.

    Args:
        grid: Flower's connection to the clients.
        nodes: client name to node id.
        config: the run's settings.
        ticket: how clients reach the language host.
        edge: the server's, on a placeholder basis.
        folder: keeps the basis as `BASIS_FILE`.
        stop: ends the wait early.

    Returns:
        The server's edge on the basis.

    Raises:
        RunError: a client delivers no usable gradient, or does not take the basis over.
        Interrupted: the run was asked to end.
    """
    file = folder.file(BASIS_FILE)
    ask = _Asking(grid, nodes, config, ticket, stop)
    up = 0
    if file.exists():
        made = put_adapters(edge.edge, config, bases=unflatten(load_file(file)))
    else:
        replies = ask.all("gather", {})
        up = sum(delivery.bytes_up for delivery in replies.values())
        parts = {client: delivery.reply.leaves or {} for client, delivery in replies.items()}
        made = put_adapters(edge.edge, config, stats=statistics(parts))
    basis = {f"{s}.{n}": t for s in made.layers for n, t in made.layer(s).export_basis().items()}
    if not file.exists():
        partial = file.with_suffix(".part")
        save_file(basis, partial)
        partial.replace(file)
    for client, delivery in ask.all("install", basis).items():
        if delivery.reply.facts.get("basis") != made.basis_fingerprint():
            raise RunError(
                f"client {client} stands on basis {delivery.reply.facts.get('basis', 'unknown')[:16]}, the server on "
                f"{made.basis_fingerprint()[:16]}. Give both the same version of fednano."
            )
    down = len(nodes) * sum(t.nbytes for t in basis.values())
    folder.append_event("basis", f"{made.basis_fingerprint()}, {up} bytes gathered, {down} bytes shipped")
    return made


@dataclass(frozen=True)
class _Asking:
    grid: Grid
    nodes: Mapping[str, int]
    config: RunConfig
    ticket: HostTicket
    stop: Stop

    def all(self, what: str, leaves: Mapping[str, Tensor]) -> dict[str, Delivery]:
        """Ask every client for ``what``; a single failure ends the run, for all must stand on one basis."""
        record = Instruction(self.config, what, 0, self.ticket, False, {}, dict(leaves))
        shared: dict[int, ArrayRecord] = {}
        asked = {name: (node, record.to_records(shared)) for name, node in self.nodes.items()}
        replies = {}
        for delivery in exchange(
            self.grid,
            asked,
            message_type=f"query.{what}",
            group=what,
            timeout=self.config.round_timeout,
            stop=self.stop,
            again=Again(lambda _: record.to_records(), self.config.rejoin_timeout),
        ):
            if delivery.reply.failure is not None:
                raise RunError(
                    f"the adapters' basis needs every client, but {delivery.client} says: "
                    f"{delivery.reply.failure.message}"
                )
            replies[delivery.client] = delivery
        return replies
