"""What a phase of a run works with, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from fednano.aggregation import Rule, Spec, State
from fednano.federation.config import RunConfig
from fednano.federation.evaluator import Evaluator
from fednano.federation.exchange import Delivery, Stop
from fednano.federation.messages import HostTicket
from fednano.models.edge import NanoEdge
from fednano.runs import RunFolder, RunView
from fednano.security.audit import Auditor

__all__ = ["MAIN_PHASE", "Federation", "Leaves", "Merge", "PhaseResult", "WireTotals", "sent_beside"]

Leaves = dict[str, Tensor]

MAIN_PHASE = "federated"
"""The phase that the run exists for; its checkpoints stand directly in the run folder."""


@dataclass
class WireTotals:
    """Bytes counted over one phase.

    Attributes:
        updates: replies that carried an update.
        adapter_up: bytes of their updates, as Flower serialised them.
        requests: training requests sent.
        adapter_down: bytes of the leaves in them, and of what the merge rule sends beside these.
        samples: samples of all training steps.
        activation_up: bytes sent to the language host in these steps.
        activation_down: bytes that came back.
    """

    updates: int = 0
    adapter_up: int = 0
    requests: int = 0
    adapter_down: int = 0
    samples: int = 0
    activation_up: int = 0
    activation_down: int = 0

    def add_reply(self, delivery: Delivery) -> None:
        """Count one reply."""
        metrics = delivery.reply.metrics
        self.updates += 1
        self.adapter_up += delivery.leaves_bytes
        self.samples += int(metrics.get("step-samples", 0))
        self.activation_up += int(metrics.get("step-sent", 0))
        self.activation_down += int(metrics.get("step-received", 0))

    def add(self, other: WireTotals) -> None:
        """Count what was counted elsewhere."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def planes(self) -> dict[str, int]:
        """Bytes by plane and direction, for metrics and displays."""
        return {
            "adapter_up": self.adapter_up,
            "adapter_down": self.adapter_down,
            "activation_up": self.activation_up,
            "activation_down": self.activation_down,
        }


@dataclass(frozen=True)
class Federation:
    """What every phase of a run works with.

    Attributes:
        grid: Flower's connection to the clients.
        nodes: client name to node id.
        config: the run's settings.
        ticket: how clients reach the language host.
        spec: what an update must look like.
        folder: where everything is written.
        view: what the user sees.
        stop: a request to end early.
        evaluator: judges adapters on the test set.
        simulated: whether the clients hold parts of one data set, instead of data of their own.
        basis: fingerprint of the adapters' basis, where one was shipped.
        edge: fingerprint of the edge weights that every update must be trained on; empty = not checked.
        auditor: notes what happens, where there is an audit log.
        nano: the server's NanoEdge, which a rank schedule resizes.
        seeded: the leaves that every client makes from the seed by itself, and that need not travel to it.
    """

    grid: Grid
    nodes: Mapping[str, int]
    config: RunConfig
    ticket: HostTicket
    spec: Spec
    folder: RunFolder
    view: RunView
    stop: Stop
    evaluator: Evaluator
    simulated: bool
    basis: str = ""
    edge: str = ""
    seeded: Mapping[str, Tensor] = field(default_factory=dict)
    nano: NanoEdge | None = None
    auditor: Auditor = field(default_factory=Auditor)


@dataclass
class Merge:
    """One round's merge in progress.

    Attributes:
        state: of the rule.
        merged: client to the round that its update was trained for.
        losses: client, training loss and weight of each merged update; of all together under one name where the server
            knows no more.
        failures: why the others of this round were not merged.
    """

    state: State
    merged: dict[str, int] = field(default_factory=dict)
    losses: list[tuple[str, float, float]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class PhaseResult:
    """How a phase ended.

    Attributes:
        leaves: the merged adapters.
        wire: bytes counted.
        loss: mean training loss of the last round.
        rounds: rounds that were completed.
        memory: what the merge rule carries from round to round.
        beside: residuals that stand beside the frozen model, as `NanoEdge.load_travelling` takes them.
        accepted: client name to the last round whose update of it was merged.
        epoch: epoch of the tombstones (`fednano.runs.tombstones`) that it was made under; -1: nothing was trained yet.
    """

    leaves: Leaves
    wire: WireTotals = field(default_factory=WireTotals)
    loss: float | None = None
    rounds: int = 0
    memory: Leaves = field(default_factory=dict)
    beside: Leaves = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    epoch: int = -1

    @classmethod
    def of_checkpoint(cls, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> PhaseResult:
        """What a round's checkpoint holds; call :meth:`remember` with its memory before going on."""

        def taken(prefix: str) -> Leaves:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        return cls(
            taken("leaf."),
            wire=WireTotals(**state["wire"]),
            loss=state["loss"],
            rounds=state["round"],
            memory=taken("memory."),
            accepted=dict(state.get("accepted", {})),
            epoch=int(state.get("tombstones", 0)),
        )

    @property
    def tuned(self) -> Leaves:
        """Everything that tuning has made: the merged adapters and their residuals."""
        return {**self.leaves, **self.beside}

    def remember(self, rule: Rule, spec: Spec, memory: Leaves) -> None:
        """Take over a rule's memory, and with it the residuals that it holds."""
        self.memory = memory
        self.beside = {
            name: leaf for name, leaf in sent_beside(rule, spec, memory).items() if name.startswith("beside/")
        }


def sent_beside(rule: Rule, spec: Spec, memory: Leaves) -> Leaves:
    """What a rule sends down besides the leaves, residuals in the orientation in which rows are multiplied."""
    sent = rule.downlink(memory)
    out = {name: tensor for name, tensor in sent.items() if not name.startswith("residual/")}
    for site, product in spec.products.items():
        left, right = (sent.get(f"residual/{site}.{side}") for side in ("left", "right"))
        if left is not None and right is not None:
            rows = (left, right) if product.down == "left" else (right.T, left.T)
            out[f"beside/{site}.down"], out[f"beside/{site}.up"] = (factor.contiguous() for factor in rows)
    return out
