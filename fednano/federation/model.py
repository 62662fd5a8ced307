"""Build the parts of a run that server and clients share, from its settings: NanoEdge, language model, data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fednano.adapters import Adapter, Basis, create
from fednano.adapters import options as adapter_options
from fednano.aggregation import default_rule
from fednano.data import KINDS, Dataset, Sample, load_dataset, partition, split_holdout
from fednano.errors import ConfigError, DataError, HostRefused
from fednano.federation.config import AUTO, RunConfig
from fednano.federation.messages import HostTicket
from fednano.federation.recipe import parse_settings
from fednano.host import RemoteLLM
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LanguageModel
from fednano.models.load import load_edge, load_head
from fednano.security.place import Credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "build_adapter",
    "build_edge",
    "client_name",
    "connect",
    "divide",
    "gathers",
    "hold_out",
    "load_data",
    "load_site_data",
    "partition_samples",
    "put_adapters",
    "settled",
    "use_threads",
]


def build_adapter(config: RunConfig) -> Adapter:
    """The adapter that the settings describe; the same parametrisation on every stream."""
    known = adapter_options(config.adapter)
    options: dict[str, object] = {"rank": config.rank} if "rank" in known else {}
    if "scale" in known:
        options["scale"] = config.scale
    if "start_from" in known:
        options["start_from"] = (
            "zero"  # behind the edge an adapter adds to what is there; it replaces nothing
        )
    if config.adapter == "nano":
        options["act"] = config.activation
    elif config.activation != "linear":
        raise ConfigError(
            f"activation is {config.activation!r}, which adapter {config.adapter!r} does not have; only 'nano' does."
        )
    return create(config.adapter, **{**options, **config.adapter_settings})


def settled(config: RunConfig) -> RunConfig:
    """The settings with the rule that the adapter's algebra asks for in the place of ``auto``.

    Raises:
        ConfigError: ``rule-options`` without a rule that they are for, or an adapter that does not exist.
    """
    if config.rule != AUTO:
        return config
    if config.rule_options:
        raise ConfigError(
            f"rule-options is {config.rule_options!r}, and rule is {AUTO!r}; name the rule that the options are for."
        )
    algebra = build_adapter(config).algebra
    return config.changed(rule=default_rule(algebra, ranks_differ=bool(config.own_ranks)))


def gathers(config: RunConfig) -> bool:
    """Whether the run's adapters need the clients' gradients before they can be made."""
    return build_adapter(config).basis is Basis.STATS


def build_edge(
    config: RunConfig, bases: Mapping[str, Mapping[str, Tensor]] | None = None, *, part: str = ""
) -> NanoEdge:
    """Load the edge part of the model and put fresh adapters behind it.

    Args:
        config: the run's settings.
        bases: per stream, the basis of adapters that need gathered gradients. Without it they get a placeholder of the
            right shapes, which trains nothing sensible, but can be counted and replaced.
        part: folder with the client's part of the model; empty = the model itself.

    Raises:
        ModelError: the model cannot be loaded or is of another kind.
        ConfigError: the adapter does not exist or does not fit.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but this machine has no usable GPU. Set device to 'cpu'.")
    return put_adapters(load_edge(part or config.model, device=config.device), config, bases=bases)


def put_adapters(
    edge: EdgePart,
    config: RunConfig,
    *,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None,
    bases: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> NanoEdge:
    """Put the run's adapters behind an edge that is loaded already; see `build_edge`."""
    adapter = build_adapter(config)
    if adapter.basis is Basis.STATS and stats is None and bases is None:
        noise = torch.randn(edge.hidden_size, edge.hidden_size, generator=torch.Generator().manual_seed(0))
        stats = {stream: {"gradient": noise} for stream in config.stream_names}
    adapters = dict.fromkeys(config.stream_names, adapter)
    return NanoEdge(edge, adapters, seed=config.seed, stats=stats, bases=bases).to(config.device)


@contextmanager
def connect(
    config: RunConfig, ticket: HostTicket, own: Credentials | None = None, *, part: str = ""
) -> Iterator[LanguageModel]:
    """The run's language model: on its host, or whole in this process for placement ``local``.

    Args:
        config: the run's settings.
        ticket: how to reach the host.
        own: what this side shows and believes instead of what the ticket says.
        part: folder with the client's part of the model, for its head; empty = the model itself.

    Raises:
        HostUnavailable: the host does not answer.
        HostRefused: the host holds other weights than the run's.
    """
    if config.placement == "local":
        from fednano.models.language import LocalLLM
        from fednano.models.load import load_language

        yield LocalLLM(load_language(config.model, device=config.device))
        return
    private = config.exchange == "label-private"
    head = load_head(part or config.model, device=config.device) if private else None
    with RemoteLLM(
        ticket.address,
        token=ticket.token or None,
        root_certificates=own.root if own else ticket.root_certificates or None,
        client_key=own.key if own else None,
        client_certificate=own.certificate if own else None,
        insecure=own is None and not ticket.root_certificates,
        wire_dtype=getattr(torch, config.wire_dtype),
        lossless=config.wire_lossless,
        factored=config.exchange == "factored",
        head=head,
        retry_seconds=config.host_retry,
    ) as llm:
        if ticket.fingerprint and llm.describe().fingerprint != ticket.fingerprint:
            raise HostRefused(
                f"the host at {ticket.address} holds the weights {llm.describe().fingerprint[:16]}, but the run was "
                f"started with {ticket.fingerprint[:16]}. Point host-address at the run's own host."
            )
        yield llm


def client_name(number: int) -> str:
    """Stable name of a simulated client; names sort as their numbers do."""
    return f"client-{number:03d}"


def partition_samples(
    config: RunConfig, dataset: Dataset, number: int, clients: int
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Training and held-out samples of simulated client ``number``.

    Raises:
        DataError: the data cannot be divided as asked.
    """
    return hold_out(config, dataset, divide(config, dataset, clients)[number])


def divide(config: RunConfig, dataset: Dataset, clients: int) -> list[list[int]]:
    """Row numbers of each client in a simulation. Raises DataError where the data cannot be divided as asked."""
    if config.partition == "dirichlet" and not config.partition_by and not KINDS[dataset.kind].classes:
        raise DataError(
            f"partition is 'dirichlet', which divides by answers, and answers of {dataset.kind} data are no classes. "
            "Set partition to 'iid' or 'linear', or partition-by to a column of the data."
        )
    if config.partition == "folders" and not config.partition_by:
        # In the order of the files, as a site reads its own: a simulation of sites ends at the bits of the sites.
        rows: dict[str, list[int]] = {}
        for number, site in enumerate(dataset.groups):
            rows.setdefault(str(site), []).append(number)
        return [rows[site] for site in sorted(rows)]
    grouped = bool(config.partition_by) or config.partition == "folders"
    kind = "column" if config.partition == "folders" else config.partition
    values = dataset.groups if grouped else dataset.labels
    return _divided(tuple(values), kind, clients, config.alpha, config.seed)


@lru_cache(maxsize=1)
def _divided(
    labels: tuple[str | int, ...], kind: str, clients: int, alpha: float, seed: int
) -> list[list[int]]:
    """Row numbers of all clients. A process that plays a thousand of them divides the data once."""
    return partition(labels, kind=kind, clients=clients, alpha=alpha, seed=seed, min_samples=2)


def hold_out(
    config: RunConfig, dataset: Dataset, indices: Sequence[int]
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Divide a client's samples into those it trains on and those it judges by."""
    if config.holdout == 0:
        return dataset.rows(indices), ()
    train, held = split_holdout(indices, config.holdout, config.seed)
    return dataset.rows(train), dataset.rows(held)


def load_data(config: RunConfig, split: str = "train") -> Dataset:
    """A split of the run's data set; with partition ``folders`` what all its sites train on, each a group. Raises
    DataError."""
    if config.partition == "folders" and split == "train":
        return _all_sites(config)
    return load_dataset(config.dataset, split, kind=config.data_kind, options=config.data_settings)


def _all_sites(config: RunConfig) -> Dataset:
    base = Path(config.dataset).expanduser() / "sites"
    folders = sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    if len(folders) != config.clients:
        found = ", ".join(path.name for path in folders[:10]) or "none"
        raise DataError(
            f"partition is 'folders' with {config.clients} clients, and {base} has {len(folders)} folders ({found}). "
            "Make one for each client, or set clients to their number."
        )
    each = {path.name: load_site_data(config, str(path)) for path in folders}
    kinds = {data.kind for data in each.values()}
    if len(kinds) > 1:
        raise DataError(f"the sites below {base} hold different kinds of data: {', '.join(sorted(kinds))}.")
    samples = [
        replace(sample, id=f"{site}/{sample.id}", group=site)
        for site, data in each.items()
        for sample in data
    ]
    bad = tuple(row for data in each.values() for row in data.bad_rows)
    return Dataset(base.parent.name, "train", tuple(samples), bad, kinds.pop())


def load_site_data(config: RunConfig, path: str, kind: str = "", options: str = "") -> Dataset:
    """An institution's own data, all of it for training.

    Args:
        config: the run's settings; they say how to read the data unless the site says so itself.
        path: file or folder.
        kind: as the setting ``data-kind``.
        options: as the setting ``data-options``.

    Raises:
        DataError: it cannot be read.
    """
    own = parse_settings(options, "data-options of the node configuration") if options else None
    settings = (
        {k: v for k, v in config.data_settings.items() if k not in ("group", "test")} if own is None else own
    )
    return load_dataset(path, "train", kind=kind or config.data_kind, options=settings, whole=True)


def use_threads(config: RunConfig) -> None:
    """Fix this process's torch threads, on which the last bits of a sum depend."""
    if torch.get_num_threads() != config.threads:
        torch.set_num_threads(config.threads)
