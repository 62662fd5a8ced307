"""Rules against client drift and unfairness: SCAFFOLD (arXiv 1910.06378) and q-FedAvg (arXiv 1905.10497)."""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.fixedpoint import FixedSum, Grid
from fednano.aggregation.mean import SteppedMean, require_resolution
from fednano.aggregation.reduce import sum_of_squares
from fednano.aggregation.rule import Capability, Rule, Scalar, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Refusal, Update
from fednano.errors import ConfigError

__all__ = ["QFedAvg", "Scaffold"]


def _metric(update: Update, name: str, low: float, why: str) -> float:
    value = update.metrics.get(name)
    if value is None or not math.isfinite(value) or value < low:
        raise Refusal(
            "metric", f"metric {name!r} is {value}, and {why} needs a finite number from {low}", update.client
        )
    return float(value)


@dataclass(frozen=True)
class Scaffold(SteppedMean):
    """Control variates: clients correct each gradient by ``- c_k + c``.

    The client's variate moves by ``c_k+ = c_k - c + (theta - theta_k) / (K eta)`` with K local steps of plain
    SGD at rate eta. So its change, all that the server needs, follows from what the server has: ``(theta -
    theta_k) / (K eta) - c``. The client therefore sends the two numbers K and eta ("steps" and "lr" of
    `Update.metrics`) instead of a second adapter, and the uplink stays that of FedAvg. The server keeps ``c +=
    sum_k change_k / N`` and ``theta += server_lr (mean_k theta_k - theta)``.

    Attributes:
        clients: N, the number of clients of the whole federation; 0: as many as took part in the round.
        max_inverse: bound on ``1 / (K eta)``.
    """

    clients: int = 0
    max_inverse: float = 65536.0

    name: ClassVar[str] = "scaffold"
    capability: ClassVar[Capability] = Capability(
        summary="control variates against client drift; clients train with plain SGD",
        paper="1910.06378",
        exact=frozenset({"affine"}),
        exact_note="as FedAvg; the control variates are exact for plain SGD only",
        bytes_up="1 (the variate's change is computed on the server)",
        bytes_down="2",
        differential_privacy=False,
        needs=frozenset({"steps"}),
        late=False,
        codecs_refused=frozenset({"int4", "sign", "topk", "dct"}),
        codecs_note="what they lose would enter the control variates, divided by the step size",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clients < 0 or not 0.0 < self.max_inverse < math.inf:
            raise ConfigError(
                f"scaffold: got clients={self.clients}, max_inverse={self.max_inverse}, "
                "expected clients >= 0 and a positive number"
            )

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """Asks for control variates and plain SGD."""
        return {"control_variates": True, "optimiser": "sgd"}

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.require_current(self.name)
        grid = Grid.covering(spec.max_abs * self.max_inverse, spec.max_clients)
        state.sums["slopes"] = FixedSum(grid, state.sums["mean"].shapes)
        state.numbers["slopes"] = Fraction(0)
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        steps = _metric(update, "steps", 1.0, "SCAFFOLD")
        rate = _metric(update, "lr", 0.0, "SCAFFOLD")
        if steps * rate * self.max_inverse < 1.0:
            raise Refusal(
                "metric",
                f"steps * lr is {steps * rate}, expected at least {1 / self.max_inverse}",
                update.client,
            )
        inverse = 1.0 / (steps * rate)
        mean, slopes = state.sums["mean"], state.sums["slopes"]
        require_resolution(mean.grid, update.weight, update.client)
        require_resolution(slopes.grid, inverse, update.client)
        # Both bounds are the bound on the leaves times that on the factor: what the first sum accepts, so does
        # the second.
        mean.add(update.leaves, update.weight)
        slopes.add(update.leaves, inverse)
        state.numbers["slopes"] += Fraction(inverse)
        state.count(update)
        return state

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        merged = super().finish(state)
        current = state.require_current(self.name)
        merged_count = len(state.clients)
        total = max(self.clients, merged_count)
        inverse = float(state.numbers["slopes"])
        fresh: Leaves = {}
        for name in state.sums["mean"].shapes:
            base = current[name].double()
            c = state.memory.get(f"c/{name}", torch.zeros_like(base))
            change = base * inverse - state.sums["slopes"].value(name) - merged_count * c
            fresh[f"c/{name}"] = c + change / total
        state.memory = fresh
        return merged

    def memory(self, state: State) -> Leaves:
        """The server's control variate, ``c/<leaf>`` in float64."""
        return dict(state.memory)

    def downlink(self, memory: Mapping[str, Tensor]) -> Leaves:
        """The control variate as ``control/<leaf>`` in float32."""
        return {f"control/{k.removeprefix('c/')}": v.float() for k, v in memory.items() if k.startswith("c/")}


@dataclass(frozen=True)
class QFedAvg(Rule):
    """Fair averaging: clients with a high loss count more.

    With L = 1 / lr, F_k the client's loss of the global adapter, and ``g_k = L (theta - theta_k)``:
    ``theta -= sum_k F_k**q g_k / sum_k (q F_k**(q - 1) |g_k|**2 + L F_k**q)``. Weights do not enter, as in the
    paper; q = 0 is the plain mean.

    Attributes:
        q: strength of fairness.
        lr: the clients' learning rate, which estimates the Lipschitz constant as 1 / lr.
        max_loss: bound on a client's loss.
    """

    q: float = 0.2
    lr: float = 0.1
    max_loss: float = 100.0

    name: ClassVar[str] = "qfedavg"
    capability: ClassVar[Capability] = Capability(
        summary="fair averaging: clients with a high loss count more",
        paper="1905.10497",
        exact=frozenset(),
        exact_note="a fairness-weighted step; q = 0 is the unweighted mean of the leaves",
        secure_aggregation=False,  # the server measures each client's change
        differential_privacy=False,
        needs=frozenset({"loss"}),
        late=False,
    )

    def __post_init__(self) -> None:
        if not (0.0 <= self.q < math.inf and 0.0 < self.lr < math.inf and 0.0 < self.max_loss < math.inf):
            raise ConfigError(
                f"qfedavg: got q={self.q}, lr={self.lr}, max_loss={self.max_loss}, expected q >= 0 and positive numbers"
            )

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """Asks for the loss of the global adapter before training."""
        return {"initial_loss": True}

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.require_current(self.name)
        bound = spec.max_abs * max(1.0, (self.max_loss + 1e-10) ** self.q)
        shapes = {n: spec.leaves[n].shape for n in self.travelling(spec, round)}
        state.sums["mean"] = FixedSum(Grid.covering(bound, spec.max_clients), shapes)
        state.numbers.update(factors=Fraction(0), h=Fraction(0))
        return state

    def add(self, state: State, update: Update) -> State:
        """See `Rule.add`."""
        state.admit(update)
        loss = _metric(update, "loss", 0.0, "q-FedAvg")
        if loss > self.max_loss:
            raise Refusal("metric", f"loss is {loss:.6g}, bound is {self.max_loss:.6g}", update.client)
        current = state.require_current(self.name)
        factor = (loss + 1e-10) ** self.q
        require_resolution(state.sums["mean"].grid, factor, update.client)
        inverse = 1.0 / self.lr
        square = 0.0
        for name in state.sums["mean"].shapes:
            square += sum_of_squares(current[name].double() - update.leaves[name].double())
        state.sums["mean"].add(update.leaves, factor)
        h = self.q * (loss + 1e-10) ** (self.q - 1.0) * inverse**2 * square + inverse * factor
        state.numbers["h"] += Fraction(h)
        state.numbers["factors"] += Fraction(factor)
        state.count(update)
        return state

    def finish(self, state: State) -> Leaves:
        """See `Rule.finish`."""
        state.require_updates()
        current = state.require_current(self.name)
        h, factors = float(state.numbers["h"]), float(state.numbers["factors"])
        out = dict(current)
        for name in state.sums["mean"].shapes:
            base = current[name].double()
            step = (base * factors - state.sums["mean"].value(name)) / (self.lr * h)
            out[name] = (base - step).to(current[name].dtype)
        return out
