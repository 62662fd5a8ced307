"""Server optimisers: the merged change is a pseudo-gradient (arXiv 2003.00295; FedAvgM arXiv 1909.06335).

With ``d = merged - current`` and lr the server's learning rate (option ``server_lr``):

- FedAvgM: ``m = beta m + d``; ``theta = current + lr m``
- FedAdam: ``m = b1 m + (1 - b1) d``; ``v = b2 v + (1 - b2) d**2``; ``theta = current + lr_t m / (sqrt(v) + tau)``,
  with Adam's correction ``lr_t = lr sqrt(1 - b2**t) / (1 - b1**t)`` if asked
- FedYogi: ``v = v - (1 - b2) d**2 sign(v - d**2)``, no correction
- FedAdagrad: ``v = v + d**2``, ``m = d``
- FedExP (arXiv 2301.09604): ``theta = current + lr max(1, sum_k w_k |d_k|**2 / (2 (|d|**2 + eps))) d``, with d_k the
  change of client k and the weights w_k summing to one: the more the clients' changes differ, the longer the step

The change comes from any other rule (``over``): FedAvg's mean by default, Fisher's or a robust rule's as well.
Momenta are float64 and part of the checkpoint.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.mean import check_server_lr
from fednano.aggregation.reduce import sum_of_squares
from fednano.aggregation.rule import Capability, Rule, Scalar, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Update
from fednano.errors import ConfigError

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedExP", "FedYogi", "ServerOptimiser"]


def _capability(summary: str, paper: str) -> Capability:
    return Capability(
        summary=summary,
        paper=paper,
        exact=frozenset(),
        exact_note="a step along the change that the rule below it merges",
    )


@dataclass(frozen=True)
class ServerOptimiser(Rule):
    """What they have in common; not a rule by itself.

    Attributes:
        server_lr: the server's learning rate.
        decay: factor on the learning rate per round.
        over: name of the rule that merges the change.
    """

    server_lr: float = 1.0
    decay: float = 1.0
    over: str = "fedavg"

    moments: ClassVar[tuple[str, ...]] = ("m", "v")
    """Which of the two moments outlive the round."""
    measures_clients: ClassVar[bool] = False
    """Whether the step depends on single clients' changes, and not on the merged one alone."""

    def __post_init__(self) -> None:
        check_server_lr(self.name, self.server_lr)
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"{self.name}: got decay={self.decay}, expected above 0 and at most 1")
        for name in ("beta", "beta1", "beta2"):
            value = getattr(self, name, 0.0)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{self.name}: got {name}={value}, expected at least 0 and below 1")
        if getattr(self, "tau", 1.0) <= 0.0:
            raise ConfigError(
                f"{self.name}: got tau={getattr(self, 'tau', None)}, expected a positive number"
            )
        if isinstance(self._inner(), ServerOptimiser):
            raise ConfigError(f"{self.name}: over={self.over!r} is a server optimiser itself; one is enough")

    def _inner(self) -> Rule:
        from fednano.aggregation.registry import create_rule  # the registry knows this class

        return create_rule(self.over)

    def travelling(self, spec: Spec, round: int = 0) -> tuple[str, ...]:
        """As the rule below."""
        return self._inner().travelling(spec, round)

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """As the rule below."""
        return self._inner().client_config(round)

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        below = {k.removeprefix("over/"): v for k, v in (memory or {}).items() if k.startswith("over/")}
        state = self._inner().init(spec, current=current, memory=below, round=round)
        state.require_current(self.name)
        state.outer = {k: v for k, v in (memory or {}).items() if not k.startswith("over/")}
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        return self._inner().add(state, update)

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        inner = self._inner()
        merged = inner.finish(state)
        current = state.require_current(self.name)
        old, new = state.outer, {f"over/{k}": v for k, v in inner.memory(state).items()}
        steps = int(old["step"].item()) + 1 if "step" in old else 1
        new["step"] = torch.tensor(steps, dtype=torch.int64)
        names = inner.travelling(state.spec, state.round)
        changes = {name: merged[name].double() - current[name].double() for name in names}
        rate = self.server_lr * self.decay ** (steps - 1) * self._length(state, changes)
        out = dict(merged)
        for name, change in changes.items():
            base, nothing = current[name].double(), torch.zeros_like(change)
            before = {kind: old.get(f"{kind}/{name}", nothing) for kind in ("m", "v")}
            move, m, v = self._step(change, before["m"], before["v"], steps)
            after = {"m": m, "v": v}
            new |= {f"{kind}/{name}": after[kind] for kind in self.moments}
            out[name] = (base + rate * move).to(merged[name].dtype)
        state.outer = new
        return out

    def memory(self, state: State) -> Leaves:
        """Momenta ``m/<leaf>``, ``v/<leaf>`` (float64), the number of steps, and what the rule below remembers."""
        return dict(state.outer)

    def downlink(self, memory: Mapping[str, Tensor]) -> Leaves:
        """As the rule below."""
        below = {k.removeprefix("over/"): v for k, v in memory.items() if k.startswith("over/")}
        return self._inner().downlink(below)

    def for_client(
        self,
        leaves: Leaves,
        spec: Spec,
        *,
        ranks: Mapping[str, int] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Leaves:
        """As the rule below."""
        return self._inner().for_client(leaves, spec, ranks=ranks, scales=scales)

    def _length(self, state: State, changes: Leaves) -> float:
        """A factor on the learning rate, from the merged change of all leaves (float64)."""
        return 1.0

    def _step(self, d: Tensor, m: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """From the change ``d`` and both moments (one shape): the move, and the new moments."""
        raise NotImplementedError


@dataclass(frozen=True)
class FedAvgM(ServerOptimiser):
    """Server momentum."""

    beta: float = 0.9

    moments: ClassVar[tuple[str, ...]] = ("m",)
    name: ClassVar[str] = "fedavgm"
    capability: ClassVar[Capability] = _capability("server momentum over the merged change", "1909.06335")

    def _step(self, d: Tensor, m: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta * m + d
        return m, m, v


@dataclass(frozen=True)
class FedAdam(ServerOptimiser):
    """Adam on the server.

    Attributes:
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        tau: added to the root of the second moment.
        correct_bias: Adam's correction for moments that start at zero.
    """

    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    correct_bias: bool = True

    name: ClassVar[str] = "fedadam"
    capability: ClassVar[Capability] = _capability("Adam on the server over the merged change", "2003.00295")

    def _step(self, d: Tensor, m: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta1 * m + (1 - self.beta1) * d
        v = self.beta2 * v + (1 - self.beta2) * d * d
        rate = math.sqrt(1 - self.beta2**steps) / (1 - self.beta1**steps) if self.correct_bias else 1.0
        return rate * m / (v.sqrt() + self.tau), m, v


@dataclass(frozen=True)
class FedYogi(ServerOptimiser):
    """Yogi on the server: the second moment moves by bounded steps."""

    server_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    name: ClassVar[str] = "fedyogi"
    capability: ClassVar[Capability] = _capability("Yogi on the server over the merged change", "2003.00295")

    def _step(self, d: Tensor, m: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        m = self.beta1 * m + (1 - self.beta1) * d
        v = v - (1 - self.beta2) * d * d * torch.sign(v - d * d)
        return m / (v.sqrt() + self.tau), m, v


@dataclass(frozen=True)
class FedAdagrad(ServerOptimiser):
    """Adagrad on the server."""

    server_lr: float = 0.01
    tau: float = 1e-3

    moments: ClassVar[tuple[str, ...]] = ("v",)
    name: ClassVar[str] = "fedadagrad"
    capability: ClassVar[Capability] = _capability(
        "Adagrad on the server over the merged change", "2003.00295"
    )

    def _step(self, d: Tensor, m: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        v = v + d * d
        return d / (v.sqrt() + self.tau), d, v


@dataclass(frozen=True)
class FedExP(ServerOptimiser):
    """Extrapolation: a step as long as the clients' changes disagree, never shorter than the merged change.

    Where all clients send one change the step is that change; where they are orthogonal and many it approaches half
    the sum of them. ``state.report["server_step"]`` is the factor that was taken.

    Attributes:
        eps: added to the squared norm of the merged change, against steps that explode where changes cancel.
    """

    eps: float = 1e-3

    moments: ClassVar[tuple[str, ...]] = ()
    measures_clients: ClassVar[bool] = True
    name: ClassVar[str] = "fedexp"
    capability: ClassVar[Capability] = Capability(
        summary="a step along the merged change, as long as the clients' changes disagree",
        paper="2301.09604",
        exact=frozenset(),
        exact_note="an extrapolation of the change that the rule below it merges",
        secure_aggregation=False,  # the server measures each client's change
        differential_privacy=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.eps < math.inf:
            raise ConfigError(f"fedexp: got eps={self.eps}, expected a positive number")

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.numbers["squares"] = Fraction(0)
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        current = state.require_current(self.name)
        state = super().add(state, update)  # refuses what is not finite or of another shape
        square = math.fsum(
            sum_of_squares(leaf.double() - current[name].double()) for name, leaf in update.leaves.items()
        )
        state.numbers["squares"] += Fraction(update.weight) * Fraction(square)
        return state

    def _length(self, state: State, changes: Leaves) -> float:
        mean = float(state.numbers["squares"] / state.weight)
        whole = math.fsum(sum_of_squares(change) for change in changes.values())
        state.report["server_step"] = max(1.0, mean / (2.0 * (whole + self.eps)))
        return state.report["server_step"]

    def _step(self, d: Tensor, m: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        return d, m, v
