"""What is asked of the runner, what it says after each round, and what it hands back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from fednano.errors import ConfigError
from fednano.unlearning.fila import Pair
from fednano.unlearning.measure import Measurement
from fednano.unlearning.methods import get_method

__all__ = ["RoundRecord", "Status", "UnlearnOutcome", "UnlearnRequest", "Unlearner"]

Status = Literal[
    "reached", "round limit", "utility floor", "diverged", "stopped", "never trained on", "retrained"
]


@dataclass(frozen=True)
class UnlearnRequest:
    """What to forget, and how.

    Attributes:
        run: a run's id, folder or ``"latest"``.
        client: the site that owns the samples.
        samples: ids of its samples to forget.
        method: a name of `fednano.unlearning.methods`.
        rank: components that FILA trains; more than the adapter has means all.
        rounds: most rounds.
        steps: optimiser steps of each party in a round.
        seed: same seed, same bits.
        utility_floor: smallest part of the utility before that a result must keep, in ``(0, 1]``.
        batch_size: most samples a step, of each kind.
        learning_rate: step size; 0 takes the run's own.
        fisher_samples: most samples of each kind for FILA's Fishers.
        runs_dir: folder of the run folders.
        withheld: ids of its samples that no round has trained on, and none is to.
    """

    run: str | Path
    client: str
    samples: tuple[str, ...]
    method: str = "loku"
    rank: int = 4
    rounds: int = 5
    steps: int = 20
    seed: int = 0
    utility_floor: float = 0.9
    batch_size: int = 16
    learning_rate: float = 0.0
    fisher_samples: int = 64
    runs_dir: str | Path = "runs"
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        get_method(self.method)
        for name in ("rank", "rounds", "steps", "batch_size", "fisher_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not 0 < self.utility_floor <= 1:
            raise ConfigError(
                f"utility_floor is {self.utility_floor}; expected a share above 0 and at most 1."
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ConfigError(f"learning_rate is {self.learning_rate}; expected 0 or a positive number.")


@dataclass(frozen=True)
class RoundRecord:
    """One round, for a live view and the receipt.

    Attributes:
        round: counted from 1; for retraining, the run's own number.
        rounds: most rounds.
        ihl: inverted hinge of the forget set after the round, in ``[0, 2]``.
        forget_loss: its loss, nats a token.
        forget_probability: its mean answer probability.
        retain_loss: mean cross-entropy on retained samples as the parties met them; ``None`` where nobody took any.
        el: extraction likelihood ``EL_10``; ``None``: the answers are too short for it.
        ma: memorisation accuracy.
        utility: mean answer probability on the test questions.
        accuracy: share of right test answers.
        acceptable: whether the utility is above its floor.
        forgotten: whether EL and MA are at or below those of unseen samples.
        client_seconds: seconds that the parties took, together.
        bytes: adapter bytes that a deployment sends up and down in the round.
    """

    round: int
    rounds: int
    ihl: float
    forget_loss: float
    forget_probability: float
    retain_loss: float | None
    el: float | None
    ma: float
    utility: float
    accuracy: float
    acceptable: bool
    forgotten: bool
    client_seconds: float
    bytes: int


@dataclass(frozen=True)
class UnlearnOutcome:
    """How a job's computation ended.

    Attributes:
        status: ``reached``: forgotten, at or above the utility floor. ``retrained``: exact. ``round limit`` and
            ``utility floor``: the best acceptable round so far is handed over, it is not forgotten by the stop rule.
            ``diverged``, ``stopped``: the same, and why. ``never trained on``: nothing was done.
        leaves: the shadow adapter: leaves of the run's own kind. The run's adapter where no round was acceptable.
        best_round: the round that the leaves are from; 0: the run's adapter, unchanged.
        records: one a round.
        before: the run's adapter; ``None`` where nothing was done.
        after: the shadow adapter; ``None`` where nothing was done.
        thresholds: ``ma`` and ``el`` of unseen samples under the run's adapter, and the ``utility`` floor.
        start: how FILA started, in words and numbers; empty for methods without it.
        pairs: stream to the rank-2r pair that the shadow adapter differs by; empty without FILA.
        exact: whether no gradient of a forgotten sample is in the leaves.
        first_exposure: first round that trained on one of the samples; ``None``: none did.
        ignored: ids that the owner only held out.
        client_seconds: of all parties in all rounds.
        seconds: wall time with measurements.
        notes: what else was approximated, for the receipt.
    """

    status: Status
    leaves: dict[str, Tensor]
    best_round: int
    records: list[RoundRecord]
    before: Measurement | None
    after: Measurement | None
    thresholds: dict[str, float | None]
    start: dict[str, Any]
    pairs: dict[str, Pair]
    exact: bool
    first_exposure: int | None
    ignored: tuple[str, ...]
    client_seconds: float
    seconds: float
    request: UnlearnRequest | None = field(default=None)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but tensors and sample ids, as JSON values."""
        return {
            "status": self.status,
            "best_round": self.best_round,
            "records": [asdict(record) for record in self.records],
            "before": None if self.before is None else self.before.to_json(),
            "after": None if self.after is None else self.after.to_json(),
            "thresholds": self.thresholds,
            "start": self.start,
            "exact": self.exact,
            "first_exposure": self.first_exposure,
            "ignored": len(self.ignored),
            "client_seconds": self.client_seconds,
            "seconds": self.seconds,
        }


class Unlearner(Protocol):
    """What a job calls: `unlearn`, or something that runs it elsewhere."""

    def __call__(
        self,
        request: UnlearnRequest,
        *,
        progress: Callable[[RoundRecord], None],
        stop: Callable[[], bool],
    ) -> UnlearnOutcome:
        """Unlearn; see `unlearn`."""
        ...
