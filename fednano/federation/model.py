"""Build the parts of a run that server and clients share, from its settings: NanoEdge, language model, data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from fednano.adapters import Adapter, create
from fednano.adapters import options as adapter_options
from fednano.data import Sample, load_dataset, partition, split_holdout
from fednano.errors import ConfigError, HostRefused
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.host import RemoteLLM
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.models.load import load_edge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fednano.data import Dataset

__all__ = ["build_adapter", "build_edge", "client_name", "connect", "partition_samples", "use_threads"]


def build_adapter(config: RunConfig) -> Adapter:
    """The adapter that the settings describe; the same parametrisation on every stream."""
    known = adapter_options(config.adapter)
    options: dict[str, object] = {"rank": config.rank} if "rank" in known else {}
    if "scale" in known:
        options["scale"] = config.scale
    if config.adapter == "nano":
        options["act"] = config.activation
    elif config.activation != "linear":
        raise ConfigError(
            f"activation is {config.activation!r}, which adapter {config.adapter!r} does not have; only 'nano' does."
        )
    return create(config.adapter, **{**options, **config.adapter_settings})


def build_edge(config: RunConfig) -> NanoEdge:
    """Load the edge part of the model and put fresh adapters behind it.

    Raises:
        ModelError: the model cannot be loaded or is of another kind.
        ConfigError: the adapter does not exist or does not fit.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but this machine has no usable GPU. Set device to 'cpu'.")
    edge = load_edge(config.model, device=config.device)
    adapter = build_adapter(config)
    nano = NanoEdge(edge, dict.fromkeys(config.stream_names, adapter), seed=config.seed)
    return nano.to(config.device)


@contextmanager
def connect(config: RunConfig, ticket: HostTicket) -> Iterator[LanguageModel]:
    """The run's language model: on its host, or whole in this process for placement ``local``.

    Raises:
        HostUnavailable: the host does not answer.
        HostRefused: the host holds other weights than the run's.
    """
    if config.placement == "local":
        from fednano.models.language import LocalLLM
        from fednano.models.load import load_language

        yield LocalLLM(load_language(config.model, device=config.device))
        return
    with RemoteLLM(
        ticket.address,
        token=ticket.token or None,
        root_certificates=ticket.root_certificates or None,
        insecure=not ticket.root_certificates,
        wire_dtype=getattr(torch, config.wire_dtype),
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
) -> tuple[list[Sample], list[Sample]]:
    """Training and held-out samples of simulated client ``number``.

    Raises:
        DataError: the data cannot be divided as asked.
    """
    parts = partition(
        dataset.labels,
        kind=config.partition,
        clients=clients,
        alpha=config.alpha,
        seed=config.seed,
        min_samples=2,
    )
    return hold_out(config, dataset, parts[number])


def hold_out(
    config: RunConfig, dataset: Dataset, indices: Sequence[int]
) -> tuple[list[Sample], list[Sample]]:
    """Divide a client's samples into those it trains on and those it judges by."""
    if config.holdout == 0:
        return [dataset[index] for index in indices], []
    train, held = split_holdout(indices, config.holdout, config.seed)
    return [dataset[index] for index in train], [dataset[index] for index in held]


def load_training_data(name_or_path: str) -> Dataset:
    """The training split of a data set, by name or folder."""
    return load_dataset(name_or_path, "train")


def use_threads(config: RunConfig) -> None:
    """Fix this process's torch threads, on which the last bits of a sum depend."""
    if torch.get_num_threads() != config.threads:
        torch.set_num_threads(config.threads)
