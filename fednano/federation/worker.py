"""What a client's process keeps between requests: models, data, features and the connection to the host.

They outlive a request wherever the process does (Flower's simulation keeps its workers, a site its warm one), so only
a client's first request pays for them.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fednano.data import BadRow, Dataset, Sample
from fednano.errors import ConfigError, DataError
from fednano.federation.config import RunConfig, Scalar
from fednano.federation.gathering import BasisStore, unflatten
from fednano.federation.messages import HostTicket
from fednano.federation.model import (
    build_edge,
    client_name,
    connect,
    hold_out,
    load_data,
    load_site_data,
    partition_samples,
    put_adapters,
    use_threads,
)
from fednano.host import RemoteLLM
from fednano.models.client_part import find_client_part
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.runs.tombstones import Tombstones
from fednano.security.place import Credentials
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

__all__ = ["POOL", "Share", "Withdrawn", "Worker", "site_name"]

POOL = "pool"
"""Name under which the centralised baseline trains."""


@dataclass
class Share:
    """One client's data as this process holds it."""

    data: ClientData
    held_out: Sequence[Sample]
    forgotten: str
    kind: str


class Withdrawn(DataError):
    """A client whose every training sample is forgotten."""


_PASSING = frozenset(
    {
        *("rounds", "samples", "batch-size", "optimizer", "learning-rate", "weight-decay", "proximal-mu"),
        *("clip-norm", "rule", "rule-options", "fisher-samples", "fraction", "min-replies", "max-abs"),
        *("round-timeout", "rejoin-timeout", "evaluate-every", "evaluate-samples", "final-samples"),
        *("max-new-tokens", "codec"),
        *(
            "codec-options",
            "baselines",
            "over-select",
            "late",
            "staleness",
            "max-norm",
            "lr-schedule",
            "lr-final",
        ),
        *(
            "start-from",
            "probe-forgotten-every",
            "guard-forgotten",
            "rank-schedule",
            "client-ranks",
            "early-stop",
            "keep",
            "metric",
        ),
        "host-options",
        *("evaluate-clients-every", "secure-aggregation", "secure-threshold", "faults"),
        *("dp", "dp-clip", "dp-noise", "dp-epsilon", "dp-delta"),
    }
)
"""Settings that come with each request and decide nothing about what a process loads."""


def _loaded(config: RunConfig) -> dict[str, Scalar]:
    """The settings that decide what a process loads; runs that agree in them share it."""
    return {name: value for name, value in config.to_mapping().items() if name not in _PASSING}


class Worker:
    """Everything a process keeps between requests of runs that load the same.

    Args:
        config: the run's settings.
        node: Flower's node configuration: ``partition-id`` and ``num-partitions`` in a simulation; at an institution
            ``data`` (its folder or file) and ``site`` (its name), ``data-kind`` and ``data-options`` where its
            data is laid out in its own way, and ``models`` where it holds the client's part of models only.
    """

    _current: Worker | None = None
    _lock = threading.Lock()

    forgotten = Tombstones()
    """What the request at hand says that its client must leave out."""

    credentials: Credentials | None = None
    """What this site shows the language host, and whom it believes; a simulated client has none."""

    models: Path | None = None
    """Where this site keeps the client's parts of models, to need no more of them; ``None`` = no such place."""

    began = 0.0
    """When Flower's process for the request at hand began, seconds since 1970; 0 = not known."""

    def __init__(self, config: RunConfig) -> None:
        use_threads(config)
        self.config = config
        split = config.placement == "split"
        self._part = find_client_part(self.models, config.model) if split and self.models else ""
        self.edge = build_edge(config, part=self._part)
        cache = Path(config.cache_dir) if config.cache_dir else None
        self.features = FeatureCache(self.edge.edge, cache)
        self._bases = BasisStore((cache or Path(tempfile.gettempdir())) / "bases")
        self._basis = ""
        self._shares: dict[str, Share] = {}
        self._datasets: dict[str, Dataset] = {}
        self._connection = ExitStack()
        self._ticket: HostTicket | None = None
        self._llm: LanguageModel | None = None

    @classmethod
    def get(cls, config: RunConfig) -> Worker:
        """This process's worker for a run; a worker of another run makes room first."""
        with cls._lock:
            if cls._current is None or _loaded(cls._current.config) != _loaded(config):
                cls.close_current()
                cls._current = Worker(config)
            return cls._current

    @classmethod
    def close_current(cls) -> None:
        """Let go of models and connections."""
        if cls._current is not None:
            cls._current._connection.close()
            cls._current = None

    @property
    def edge(self) -> NanoEdge:
        """The NanoEdge with the run's adapters."""
        return self._edge

    @edge.setter
    def edge(self, fresh: NanoEdge) -> None:
        self._edge, self.start = fresh, fresh.travelling()

    def llm(self, ticket: HostTicket) -> LanguageModel:
        """The connection to the run's language model, opened once."""
        if self._llm is None or replace(ticket, token=b"") != self._ticket:
            self._connection.close()
            self._connection = ExitStack()
            self._llm = self._connection.enter_context(
                connect(self.config, ticket, self.credentials, part=self._part)
            )
            self._ticket = replace(ticket, token=b"")
        elif isinstance(self._llm, RemoteLLM) and ticket.token:
            self._llm.use_token(ticket.token)
        return self._llm

    def install(self, basis: Mapping[str, Tensor]) -> None:
        """Make the adapters anew on a basis that the server made, and keep it for later processes."""
        self.edge = put_adapters(self.edge.edge, self.config, bases=unflatten(basis))
        self._basis = self.edge.basis_fingerprint()
        self._bases.save(self._basis, basis)

    def require_basis(self, fingerprint: str) -> None:
        """See to it that the adapters stand on the run's basis.

        Raises:
            RunError: this site does not have it.
        """
        if fingerprint and fingerprint != self._basis:
            self.edge = put_adapters(
                self.edge.edge, self.config, bases=unflatten(self._bases.load(fingerprint))
            )
            self._basis = fingerprint

    def share(self, name: str, node: Mapping[str, Any], *, pool: bool) -> Share:
        """The samples that a client trains on and those it judges by, without the forgotten ones.

        Raises:
            Withdrawn: every sample that it could train on is forgotten.
        """
        key, forgotten = POOL if pool else name, self.forgotten
        if key not in self._shares or self._shares[key].forgotten != forgotten.digest:
            dataset, train, held = self._samples(node, pool=pool)
            kept = forgotten.keep(train)
            if train and not kept:
                raise Withdrawn(f"all training samples of {name} are forgotten; it takes no part any more.")
            data = ClientData(kept, self.edge, self.features)
            self._shares[key] = Share(data, forgotten.keep(held), forgotten.digest, dataset.kind)
        return self._shares[key]

    def samples(self, node: Mapping[str, Any]) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """Everything that a client holds, the forgotten samples among it: to train on, and to judge by."""
        _, train, held = self._samples(node, pool=False)
        return train, held

    def _samples(
        self, node: Mapping[str, Any], *, pool: bool
    ) -> tuple[Dataset, Sequence[Sample], Sequence[Sample]]:
        own_data = str(node.get("data", ""))
        if own_data:
            if pool:
                raise ConfigError(
                    "the centralised baseline needs everybody's data in one place, which only a simulation has. "
                    "Switch baselines off."
                )
            kind, options = str(node.get("data-kind", "")), str(node.get("data-options", ""))
            dataset = self._dataset(own_data, lambda: load_site_data(self.config, own_data, kind, options))
            return dataset, *hold_out(self.config, dataset, range(len(dataset)))
        dataset = self._dataset(self.config.dataset, lambda: load_data(self.config))
        if pool:
            return dataset, *hold_out(self.config, dataset, range(len(dataset)))
        number, clients = int(node["partition-id"]), int(node["num-partitions"])
        return dataset, *partition_samples(self.config, dataset, number, clients)

    def bad_rows(self) -> list[BadRow]:
        """Rows of this client's files that were left out, and why."""
        return [row for dataset in self._datasets.values() for row in dataset.bad_rows]

    def _dataset(self, name: str, load: Callable[[], Dataset]) -> Dataset:
        if name not in self._datasets:
            self._datasets[name] = load()
        return self._datasets[name]


def site_name(node: Mapping[str, Any]) -> str:
    """A client's stable name: its own, or its number in a simulation.

    Raises:
        ConfigError: the node has neither.
    """
    if node.get("site"):
        return str(node["site"])
    if "partition-id" in node:
        return client_name(int(node["partition-id"]))
    raise ConfigError(
        "this SuperNode has neither 'site' nor 'partition-id' in its node configuration. Start it with "
        '--node-config \'site="NAME" data="FOLDER"\'.'
    )
