"""Who is asked during an unlearning job, and for what: the sites' samples in this process, or live sites elsewhere.

`fednano.unlearning.runner` decides, merges and judges; everything that touches a sample is done by a `Parties`. So a
job on a finished simulation and one through SuperNodes are the same computation, and end at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fednano.aggregation import Update
from fednano.errors import Interrupted
from fednano.federation.config import RunConfig
from fednano.models.edge import NanoEdge
from fednano.training.data import ClientData
from fednano.unlearning.local import LocalResult, LocalSettings, Reference, reference_of, refusals, steps
from fednano.unlearning.measure import Measurement
from fednano.unlearning.methods import Method
from fednano.unlearning.retrain import Retrained, retrain, starting_point
from fednano.unlearning.sites import participants
from fednano.unlearning.start import Rows, site_rows

if TYPE_CHECKING:
    from fednano.unlearning.outcome import UnlearnRequest
    from fednano.unlearning.workspace import Probe, Workspace

__all__ = [
    "Contribution",
    "LocalParties",
    "Parties",
    "RoundPlan",
    "looks_back",
    "owner_weight",
    "settings_of",
]


@dataclass(frozen=True)
class RoundPlan:
    """One round, as all parties are told of it.

    Attributes:
        number: counted from 1.
        leaves: the shadow adapter to start from.
        moving: leaf to boolean tensor: what is trained.
        origin: the adapter that the first round started from; for losses that look back at it.
    """

    number: int
    leaves: dict[str, Tensor]
    moving: dict[str, Tensor]
    origin: dict[str, Tensor]


@dataclass(frozen=True)
class Contribution:
    """What one party made of a round.

    Attributes:
        update: its adapter.
        result: its losses and seconds.
        bytes: adapter bytes that crossed the wire for it, or would have.
    """

    update: Update
    result: LocalResult
    bytes: int


class Parties(Protocol):
    """The owner of the forget set and everybody else, as a job sees them."""

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        ...

    @property
    def edge(self) -> NanoEdge:
        """A NanoEdge of the run's kind; what its adapters hold is of no account."""
        ...

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The run's adapter."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What was approximated on the way, for the receipt."""
        ...

    def measure(self, leaves: Mapping[str, Tensor]) -> Measurement:
        """Everything about an adapter of the run's kind."""
        ...

    def probe(self, leaves: Mapping[str, Tensor]) -> Probe:
        """What is looked at after each round."""
        ...

    def rows(self) -> Rows:
        """FILA's row weights under the run's adapter."""
        ...

    def round(self, plan: RoundPlan) -> list[Contribution]:
        """One round of the owner's steps and everybody's; at least the owner's contribution.

        Raises:
            Interrupted: it was asked to end.
            TrainingDiverged: a loss or a gradient is not finite.
            UpdateRefused: a party's adapter is not what an update must be.
        """
        ...

    def retrained(self, exposure: int) -> tuple[int, dict[str, Tensor], Iterator[Retrained]]:
        """Train again without the samples: rounds done before any was seen, leaves after them, and the new rounds.

        Raises:
            ConfigError: that is not possible here.
        """
        ...


def owner_weight(parties: int) -> float:
    """The owner counts as much as all others together."""
    return float(max(1, parties - 1))


def looks_back(method: Method) -> bool:
    """Whether a method's loss looks back at the model before."""
    return method.forget in ("npo", "preference", "refusal") or method.retain == "kl"


def settings_of(request: UnlearnRequest, config: RunConfig) -> LocalSettings:
    """How a party trains in each round."""
    return LocalSettings(
        steps=request.steps,
        batch_size=request.batch_size,
        learning_rate=request.learning_rate or config.learning_rate,
        optimizer=config.optimizer,
        clip_norm=config.clip_norm,
    )


class LocalParties:
    """All sites' samples in this process, one site after the other.

    Args:
        work: run and scope.
        request: how to unlearn.
        method: by which method.
        stop: asked before each party.
    """

    notes: Sequence[str] = ()

    def __init__(
        self, work: Workspace, request: UnlearnRequest, method: Method, stop: Callable[[], bool]
    ) -> None:
        self._work, self._request, self._method, self._stop = work, request, method, stop
        self._forget = work.data(work.scope.forget)
        self._retain: dict[str, ClientData] = {
            name: work.data(samples) for name, samples in work.scope.retain.items()
        }
        self._reference: tuple[Reference | None, ClientData | None] | None = None

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self._work.config

    @property
    def edge(self) -> NanoEdge:
        """The run's NanoEdge."""
        return self._work.edge

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The run's adapter."""
        return self._work.leaves

    def measure(self, leaves: Mapping[str, Tensor]) -> Measurement:
        """Everything about an adapter of the run's kind."""
        return self._work.measure(leaves)

    def probe(self, leaves: Mapping[str, Tensor]) -> Probe:
        """What is looked at after each round."""
        return self._work.probe(leaves)

    def rows(self) -> Rows:
        """FILA's row weights under the run's adapter."""
        return site_rows(self._request, self._work, self._forget, self._retain)

    def round(self, plan: RoundPlan) -> list[Contribution]:
        """One round; see `Parties.round`."""
        work, owner = self._work, self._work.scope.owner
        reference, refusal = self._looking_back(plan.origin)
        done = []
        names = sorted({owner, *self._retain})
        for name in names:
            if self._stop():
                raise Interrupted(f"unlearning was asked to end in round {plan.number}.")
            work.edge.load_travelling(plan.leaves)
            mine = name == owner
            result = steps(
                work.edge,
                work.llm,
                settings_of(self._request, work.config),
                retain=self._retain.get(name),
                moving=plan.moving,
                seed=self._request.seed,
                client=name,
                round_number=plan.number,
                method=self._method if mine else None,
                forget=self._forget if mine else None,
                refusal=refusal if mine else None,
                reference=reference if mine else None,
            )
            update = Update(
                client=name,
                round=plan.number,
                weight=owner_weight(len(names)) if mine else 1.0,
                leaves=work.edge.travelling(),
                spec=work.edge.spec(),
                basis=work.edge.basis_fingerprint(),
            )
            payload = sum(leaf.numel() * leaf.element_size() for leaf in update.leaves.values())
            done.append(Contribution(update, result, 2 * payload))
        return done

    def retrained(self, exposure: int) -> tuple[int, dict[str, Tensor], Iterator[Retrained]]:
        """Train again without the samples, here."""
        work = self._work
        origin = starting_point(work.folder, exposure, work.untuned)
        rounds = retrain(
            work.config,
            work.edge,
            work.llm,
            self._retain,
            participants(work.folder),
            origin,
            stop=self._stop,
        )
        return origin[0], origin[1], rounds

    def _looking_back(self, origin: Mapping[str, Tensor]) -> tuple[Reference | None, ClientData | None]:
        """The model before, for losses that look back at it, and the refusals that some teach."""
        if self._reference is None:
            self._reference = (None, None)
            if looks_back(self._method):
                work = self._work
                work.edge.load_travelling(origin)
                refusal = refusals(self._forget, work.edge, work.features)
                self._reference = reference_of(work.edge, work.llm, self._forget, refusal), refusal
        return self._reference
