"""What a client does when the server asks: introduce itself, train, evaluate.

Loaded models, features and connections outlive a request wherever the process does (Flower's simulation keeps its
workers), so only a client's first request pays for them.
"""

from __future__ import annotations

import json
import platform
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fednano.data import BadRow, Dataset, Sample
from fednano.errors import ConfigError, DataError, FednanoError
from fednano.evaluation import exact_match
from fednano.federation.config import RunConfig, Scalar
from fednano.federation.messages import HostTicket, Instruction, Reply
from fednano.federation.model import (
    build_edge,
    client_name,
    connect,
    hold_out,
    load_training_data,
    partition_samples,
    use_threads,
)
from fednano.host import RemoteLLM
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.answers import generate_answers
from fednano.training.data import ClientData, draw
from fednano.training.features import FeatureCache
from fednano.training.fisher import empirical_fisher
from fednano.training.local import TrainSettings, train_local
from fednano.training.seeds import stream_seed

__all__ = ["POOL", "Worker", "evaluate", "hello", "perform", "train", "train_settings"]

POOL = "pool"
"""Name under which the centralised baseline trains."""


@dataclass
class _Share:
    """One client's data as this process holds it."""

    data: ClientData
    held_out: list[Sample]


class Worker:
    """Everything a process keeps between requests of one run.

    Args:
        config: the run's settings.
        node: Flower's node configuration: ``partition-id`` and ``num-partitions`` in a simulation; at an institution
            ``data`` (its folder) and ``site`` (its name).
    """

    _current: Worker | None = None
    _lock = threading.Lock()

    def __init__(self, config: RunConfig) -> None:
        use_threads(config)
        self.config = config
        self.edge: NanoEdge = build_edge(config)
        cache = Path(config.cache_dir) if config.cache_dir else None
        self.features = FeatureCache(self.edge.edge, cache)
        self._shares: dict[str, _Share] = {}
        self._datasets: dict[str, Dataset] = {}
        self._connection = ExitStack()
        self._ticket: HostTicket | None = None
        self._llm: LanguageModel | None = None

    @classmethod
    def get(cls, config: RunConfig) -> Worker:
        """This process's worker for a run; a worker of another run makes room first."""
        with cls._lock:
            if cls._current is None or cls._current.config != config:
                cls.close_current()
                cls._current = Worker(config)
            return cls._current

    @classmethod
    def close_current(cls) -> None:
        """Let go of models and connections."""
        if cls._current is not None:
            cls._current._connection.close()
            cls._current = None

    def llm(self, ticket: HostTicket) -> LanguageModel:
        """The connection to the run's language model, opened once."""
        if self._llm is None or ticket != self._ticket:
            self._connection.close()
            self._connection = ExitStack()
            self._llm = self._connection.enter_context(connect(self.config, ticket))
            self._ticket = ticket
        return self._llm

    def share(self, name: str, node: Mapping[str, Any], *, pool: bool) -> _Share:
        """The samples that a client trains on and those it judges by."""
        key = POOL if pool else name
        if key not in self._shares:
            train, held = self._samples(node, pool=pool)
            self._shares[key] = _Share(ClientData(train, self.edge, self.features), held)
        return self._shares[key]

    def _samples(self, node: Mapping[str, Any], *, pool: bool) -> tuple[list[Sample], list[Sample]]:
        own_data = str(node.get("data", ""))
        if own_data:
            if pool:
                raise ConfigError(
                    "the centralised baseline needs everybody's data in one place, which only a simulation has. "
                    "Switch baselines off."
                )
            dataset = self._dataset(own_data)
            return hold_out(self.config, dataset, range(len(dataset)))
        dataset = self._dataset(self.config.dataset)
        if pool:
            return hold_out(self.config, dataset, range(len(dataset)))
        number, clients = int(node["partition-id"]), int(node["num-partitions"])
        return partition_samples(self.config, dataset, number, clients)

    def bad_rows(self) -> list[BadRow]:
        """Rows of this client's files that were left out, and why."""
        return [row for dataset in self._datasets.values() for row in dataset.bad_rows]

    def _dataset(self, name: str) -> Dataset:
        if name not in self._datasets:
            self._datasets[name] = load_training_data(name)
        return self._datasets[name]


ADVICE = frozenset({"fisher", "proximal_mu"})
"""What this client can do for a merge rule, beyond plain training."""


def train_settings(
    config: RunConfig, *, samples: int | None = None, advice: Mapping[str, Scalar] | None = None
) -> TrainSettings:
    """The part of a run's settings that local training needs; a merge rule's advice goes before them.

    Raises:
        ConfigError: the rule asks for something that this client cannot do.
    """
    unknown = sorted(set(advice or {}) - ADVICE)
    if unknown:
        raise ConfigError(
            f"the merge rule asks clients for {', '.join(unknown)}, which this version cannot do. Update the client, "
            "or choose another rule."
        )
    mu = (advice or {}).get("proximal_mu", config.proximal_mu)
    return TrainSettings(
        samples=samples or config.samples,
        batch_size=config.batch_size,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        proximal_mu=float(mu),
        clip_norm=config.clip_norm,
    )


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


def hello(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Introduce the client: what it has and what it runs. Loads model and data, so training can start at once."""
    name = site_name(node)
    worker = Worker.get(instruction.config)
    share = worker.share(name, node, pool=False)
    facts = {
        "edge": worker.edge.edge.fingerprint,
        "spec": worker.edge.spec(),
        "basis": worker.edge.basis_fingerprint(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "simulated": str("data" not in node),
    }
    if "data" not in node:  # a real site's label counts are its own business
        facts["labels"] = json.dumps(Counter(sample.answer for sample in share.data.samples), sort_keys=True)
    bad = worker.bad_rows()
    if bad:
        facts["bad-rows"] = "; ".join(str(row) for row in bad[:3])
    metrics: dict[str, float] = {
        "bad-rows": len(bad),
        "samples": len(share.data),
        "held-out": len(share.held_out),
    }
    return Reply(name, instruction.round, metrics, facts)


def train(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Train the adapters for one round from the leaves given, and report them."""
    config, name = instruction.config, site_name(node)
    worker = Worker.get(config)
    share = worker.share(name, node, pool=instruction.pool)
    acting = POOL if instruction.pool else name
    llm = worker.llm(instruction.ticket)
    before = _wire(llm)
    encoded = worker.features.encoded
    worker.edge.load_travelling(instruction.leaves)
    torch.manual_seed(stream_seed(config.seed, "train", instruction.round, acting))
    samples = config.samples * (config.clients if instruction.pool else 1)
    outcome = train_local(
        worker.edge,
        llm,
        share.data,
        train_settings(config, samples=samples, advice=instruction.advice),
        seed=config.seed,
        client=acting,
        round_number=instruction.round,
    )
    after = _wire(llm)
    fisher = None
    if instruction.advice.get("fisher"):
        chosen = draw(
            len(share.data),
            min(config.fisher_samples, len(share.data)),
            seed=stream_seed(config.seed, "fisher", instruction.round),
            client=acting,
            start=0,
        )
        fisher = empirical_fisher(worker.edge, llm, share.data, chosen, batch_size=config.batch_size)
    metrics = {
        "loss": outcome.loss,
        "samples": outcome.samples,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "encoded": worker.features.encoded - encoded,
        "step-sent": after[0] - before[0],
        "step-received": after[1] - before[1],
        "step-samples": after[2] - before[2],
    }
    facts = {
        "spec": worker.edge.spec(),
        "basis": worker.edge.basis_fingerprint(),
        "edge": worker.edge.edge.fingerprint,
    }
    return Reply(name, instruction.round, metrics, facts, worker.edge.travelling(), fisher)


def evaluate(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Judge the leaves given on the client's held-out samples."""
    config, name = instruction.config, site_name(node)
    worker = Worker.get(config)
    share = worker.share(name, node, pool=False)
    if not share.held_out:
        raise DataError(f"{name} holds no samples out. Raise holdout, or give it more data.")
    worker.edge.load_travelling(instruction.leaves)
    answers = generate_answers(
        worker.edge,
        worker.llm(instruction.ticket),
        worker.features,
        share.held_out,
        max_new_tokens=config.max_new_tokens,
    )
    right = sum(exact_match(a, s.answer) for a, s in zip(answers, share.held_out, strict=True))
    metrics = {"accuracy": right / len(answers), "samples": len(answers)}
    return Reply(name, instruction.round, metrics, {})


def perform(
    task: Callable[[Instruction, Mapping[str, Any]], Reply], instruction: Instruction, node: Mapping[str, Any]
) -> Reply:
    """Run a task; an error a user can understand becomes the reply instead of a crash of the client's process."""
    try:
        return task(instruction, node)
    except FednanoError as error:
        try:
            name = site_name(node)
        except ConfigError:
            name = "unnamed"
        return Reply.failed(name, instruction.round, error)


def _wire(llm: LanguageModel) -> tuple[int, int, int]:
    """Bytes sent and received in training steps so far, and the samples they were for; zeros without a host."""
    if not isinstance(llm, RemoteLLM):
        return (0, 0, 0)
    step = llm.wire.step
    return (step.sent_bytes, step.received_bytes, step.samples)
