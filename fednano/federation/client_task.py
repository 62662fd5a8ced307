"""What a client does when the server asks: introduce itself, train, evaluate.

Loaded models, features and connections outlive a request wherever the process does (Flower's simulation keeps its
workers), so only a client's first request pays for them.
"""

from __future__ import annotations

import json
import platform
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fednano.data import KINDS, BadRow, Dataset, Sample
from fednano.errors import ConfigError, DataError
from fednano.evaluation import perplexity
from fednano.federation.baselines import build_rule
from fednano.federation.client_state import state_of
from fednano.federation.config import RunConfig, Scalar
from fednano.federation.faults import parse_faults
from fednano.federation.gathering import BasisStore, client_gradients, unflatten
from fednano.federation.marking import scores_of
from fednano.federation.messages import HostTicket, Instruction, Reply
from fednano.federation.misbehaviour import Vanished, falsify
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
from fednano.federation.participation import compose, contribute, own_leaves
from fednano.federation.personal import mixed_answers
from fednano.federation.schedules import fit_rank
from fednano.federation.secure_client import answer, check_ready, masked
from fednano.host import RemoteLLM
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.runs.tombstones import Tombstones
from fednano.security.place import Credentials
from fednano.training.answers import answer_losses, generate_answers, longest_answer
from fednano.training.data import ClientData, draw
from fednano.training.features import FeatureCache
from fednano.training.seeds import stream_seed

__all__ = [
    "POOL",
    "Worker",
    "evaluate",
    "gather",
    "hello",
    "install",
    "secure",
    "site_name",
    "train",
]

POOL = "pool"
"""Name under which the centralised baseline trains."""


@dataclass
class _Share:
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
        *("round-timeout", "evaluate-every", "evaluate-samples", "final-samples", "max-new-tokens", "codec"),
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
        "metric",
        *(
            "start-from",
            "probe-forgotten-every",
            "rank-schedule",
            "client-ranks",
            "early-stop",
            "keep",
            "evaluate-clients-every",
        ),
        *("secure-aggregation", "secure-threshold"),
        *("dp", "dp-clip", "dp-noise", "dp-epsilon", "dp-delta"),
        *("faults",),
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
            ``data`` (its folder or file) and ``site`` (its name), and ``data-kind`` and ``data-options`` where its
            data is laid out in its own way.
    """

    _current: Worker | None = None
    _lock = threading.Lock()

    forgotten = Tombstones()
    """What the request at hand says that its client must leave out."""

    credentials: Credentials | None = None
    """What this site shows the language host, and whom it believes; a simulated client has none."""

    began = 0.0
    """When Flower's process for the request at hand began, seconds since 1970; 0 = not known."""

    def __init__(self, config: RunConfig) -> None:
        use_threads(config)
        self.config = config
        self.edge = build_edge(config)
        cache = Path(config.cache_dir) if config.cache_dir else None
        self.features = FeatureCache(self.edge.edge, cache)
        self._bases = BasisStore((cache or Path(tempfile.gettempdir())) / "bases")
        self._basis = ""
        self._shares: dict[str, _Share] = {}
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
            self._llm = self._connection.enter_context(connect(self.config, ticket, self.credentials))
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

    def share(self, name: str, node: Mapping[str, Any], *, pool: bool) -> _Share:
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
            self._shares[key] = _Share(data, forgotten.keep(held), forgotten.digest, dataset.kind)
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


def hello(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Introduce the client: what it has and what it runs. Loads model and data, so training can start at once."""
    name = site_name(node)
    worker = Worker.get(instruction.config)
    try:
        share = worker.share(name, node, pool=False)
    except Withdrawn:
        facts = {"edge": worker.edge.edge.fingerprint, "simulated": str("data" not in node)}
        return Reply(name, instruction.round, {"bad-rows": 0, "samples": 0, "held-out": 0}, facts)
    facts = {
        "edge": worker.edge.edge.fingerprint,
        "spec": worker.edge.spec(),
        "basis": worker.edge.basis_fingerprint(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "simulated": str("data" not in node),
    }
    if "data" not in node and KINDS[share.kind].classes:  # a real site's label counts are its own business
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
    if instruction.secure:
        check_ready(instruction, state_of(instruction, node, name))
    fault = parse_faults(str(instruction.advice.get("fault", "")))
    if fault and node.get("data"):
        raise ConfigError("the server asks this client to misbehave, which only simulated clients do.")
    if any(one.kind == "vanish" for one in fault):
        raise Vanished("a simulated fault: this client vanished in this round.")
    worker = Worker.get(config)
    worker.require_basis(instruction.basis)
    share = worker.share(name, node, pool=instruction.pool)
    acting = POOL if instruction.pool else name
    llm = worker.llm(instruction.ticket)
    before = _wire(llm)
    encoded = worker.features.encoded
    ready = time.time() - Worker.began if Worker.began else 0.0
    done = contribute(
        worker,
        instruction,
        llm,
        share.data,
        state_of(instruction, node, acting),
        client=acting,
        samples=config.samples * (config.participants(config.clients) if instruction.pool else 1),
    )
    after = _wire(llm)
    metrics = {
        **done.metrics,
        **({} if config.dp == "sample" else {"loss": done.outcome.loss}),
        "samples": done.outcome.samples,
        "steps": done.outcome.steps,
        "seconds": done.outcome.seconds,
        "start": ready,
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
    reply = Reply(name, instruction.round, metrics, facts, done.leaves, done.fisher)
    if instruction.secure:
        rule = build_rule(config, config.rule)
        reply = masked(
            reply,
            instruction,
            rule,
            {**worker.start, **instruction.leaves},
            state_of(instruction, node, name),
        )
    return falsify(fault[0], reply) if fault else reply


def secure(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Take part in the exchanges of secure aggregation that are not training."""
    name = site_name(node)
    return answer(instruction, name, state_of(instruction, node, name))


def gather(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Send the gradients from which the server makes the adapters' basis."""
    config, name = instruction.config, site_name(node)
    worker = Worker.get(config)
    data = worker.share(name, node, pool=False).data
    count = min(config.gather_samples, len(data))
    chosen = draw(len(data), count, seed=stream_seed(config.seed, "gather", 0), client=name, start=0)
    data.warm(chosen)
    gradients = client_gradients(worker.edge.edge, worker.llm(instruction.ticket), data, chosen, config)
    return Reply(name, instruction.round, {"samples": count}, {}, gradients)


def install(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Take over the adapters' basis from the server."""
    name, worker = site_name(node), Worker.get(instruction.config)
    worker.install(instruction.leaves)
    return Reply(name, instruction.round, {}, {"basis": worker.edge.basis_fingerprint()})


def evaluate(instruction: Instruction, node: Mapping[str, Any]) -> Reply:
    """Judge the leaves given on the client's held-out samples."""
    config, name = instruction.config, site_name(node)
    worker = Worker.get(config)
    worker.require_basis(instruction.basis)
    share = worker.share(name, node, pool=False)
    if not share.held_out:
        raise DataError(f"{name} holds no samples out. Raise holdout, or give it more data.")
    personal = instruction.advice.get("personal") or instruction.advice.get("personal_adapter")
    memory = state_of(instruction, node, name).load(instruction.accepted) if personal else {}
    leaves = compose(worker, instruction, memory)
    fit_rank(worker.edge, leaves)
    worker.edge.load_travelling(leaves)
    llm, own = worker.llm(instruction.ticket), own_leaves(instruction, memory)
    longest = config.max_new_tokens or longest_answer(worker.edge, share.held_out)
    if own is None:
        answers = generate_answers(worker.edge, llm, worker.features, share.held_out, max_new_tokens=longest)
    else:
        answers = mixed_answers(
            *(worker.edge, own, llm, worker.features, share.held_out),
            reference=share.data.samples[: int(instruction.advice["mix_samples"])],
            strength=float(instruction.advice["mix_strength"]),
            max_new_tokens=longest,
        )
    scores = scores_of(config.metric, share.kind, answers, share.held_out)
    metrics = {"accuracy": next(iter(scores.values())), "samples": len(answers)}
    metrics |= {f"score-{name}": score for name, score in scores.items()}
    if own is None and not KINDS[share.kind].classes:
        data = ClientData(share.held_out, worker.edge, worker.features)
        loss = float(answer_losses(worker.edge, llm, data).double().mean())
        metrics |= {"eval-loss": loss, "score-perplexity": perplexity(loss)}
    return Reply(name, instruction.round, metrics, {})


def _wire(llm: LanguageModel) -> tuple[int, int, int]:
    """Bytes sent and received in training steps so far, and the samples they were for; zeros without a host."""
    if not isinstance(llm, RemoteLLM):
        return (0, 0, 0)
    step = llm.wire.step
    return (step.sent_bytes, step.received_bytes, step.samples)
