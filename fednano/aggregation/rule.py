"""The protocol of a merge rule, the state of a round's merge, and what a rule says of itself.

A rule is a frozen dataclass whose fields are its options. One round is ``init``, one ``add`` per accepted
update in any order, ``finish``. What must survive to the next round (momentum, control variates, a residual) is
plain named tensors: `Rule.memory` after ``finish``, handed to the next ``init`` and to the checkpoint in
between.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from fednano.aggregation.fixedpoint import FixedSum
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves, Refusal, Update
from fednano.errors import ConfigError, RunError

__all__ = ["Aggregator", "Capability", "Rule", "Scalar", "Seen", "State"]

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Capability:
    """What a rule says of itself; `fednano strategies` prints it and `check_combination` decides by it.

    Attributes:
        summary: one line.
        paper: arXiv id of the source.
        exact: algebras for which merging the leaves equals merging the deltas.
        exact_note: what the rule computes exactly, in words.
        allowed: algebras the rule makes sense for at all.
        bytes_up: uplink of one client and round, in adapters.
        bytes_down: downlink, in adapters; K is the number of clients merged.
        streaming: memory does not grow with the number of clients.
        secure_aggregation: the server needs nothing but sums.
        differential_privacy: one client's influence on what is merged is bounded once its update is clipped.
        ranks: clients may have different ranks.
        needs: what an update must hold besides leaves: any of "fisher", "loss", "steps", "products".
        late: an update of an earlier round can be moved onto the current adapter and merged.
        codecs_refused: uplink codecs whose error the rule cannot bear.
        codecs_note: why not.
    """

    summary: str
    paper: str
    exact: frozenset[str]
    exact_note: str
    allowed: frozenset[str] = frozenset({"affine", "multilinear", "nonlinear"})
    bytes_up: str = "1"
    bytes_down: str = "1"
    streaming: bool = True
    secure_aggregation: bool = True
    differential_privacy: bool = True
    ranks: bool = False
    needs: frozenset[str] = frozenset()
    late: bool = True
    codecs_refused: frozenset[str] = frozenset()
    codecs_note: str = ""


class Seen:
    """A set of names that keeps 8 bytes of each: ten thousand clients cost 80 kB, not a megabyte.

    Two names collide with a probability of 2**-64; the second client would then be refused as a duplicate.
    """

    def __init__(self) -> None:
        self._digests = array("Q")

    @staticmethod
    def _digest(name: str) -> int:
        return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, name: str) -> bool:
        digest = self._digest(name)
        place = bisect_left(self._digests, digest)
        return place < len(self._digests) and self._digests[place] == digest

    def add(self, name: str) -> None:
        """Put a name in; a second time changes nothing."""
        if name not in self:
            insort(self._digests, self._digest(name))


@dataclass
class State:
    """A round's merge in progress. ``add`` changes it in place and returns it.

    Attributes:
        spec: what is being merged.
        round: which round.
        current: the global leaves the clients started from, if the rule needs them.
        memory: what the rule kept from the round before.
        clients: who has been merged.
        weight: exact sum of the merged weights.
        sums: accumulators by purpose.
        held: updates of rules that need all of them.
        numbers: exact scalar sums by purpose.
        report: numbers worth a line in the metrics, filled by ``finish``.
        outer: what a server optimiser around the rule remembers.
    """

    spec: Spec
    round: int
    current: Leaves | None
    memory: Leaves
    clients: Seen = field(default_factory=Seen)
    weight: Fraction = Fraction(0)
    sums: dict[str, FixedSum] = field(default_factory=dict)
    held: list[Update] = field(default_factory=list)
    numbers: dict[str, Fraction] = field(default_factory=dict)
    outer: Leaves = field(default_factory=dict)
    report: dict[str, float] = field(default_factory=dict)

    def admit(self, update: Update) -> None:
        """Refuse a client that has been merged already and a weight that cannot be one."""
        if update.client in self.clients:
            raise Refusal("duplicate", "this client has been merged in this round", update.client)
        if not 0.0 < update.weight <= self.spec.max_weight:  # false for NaN too
            raise Refusal(
                "weight",
                f"got weight {update.weight}, expected above 0 and at most {self.spec.max_weight}",
                update.client,
            )

    def count(self, update: Update) -> None:
        """Record that an update has been merged."""
        self.clients.add(update.client)
        self.weight += Fraction(update.weight)

    def in_order(self) -> list[Update]:
        """The held updates by client name, whatever order they came in."""
        return sorted(self.held, key=lambda u: u.client)

    def require_updates(self) -> None:
        """Raises RunError when nothing has been merged."""
        if not len(self.clients):
            raise RunError(
                f"round {self.round}: no update was accepted, so there is nothing to merge; "
                "keep the current adapter, and look at the refusals in the metrics"
            )

    def require_current(self, rule: str) -> Leaves:
        """The global leaves; ConfigError when ``init`` was not given them."""
        if self.current is None:
            raise ConfigError(
                f"rule {rule!r} works on changes: pass the current global leaves to init(..., current=...)"
            )
        return self.current


@runtime_checkable
class Aggregator(Protocol):
    """Merging as a stream; `Rule` gives the other methods their defaults."""

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """Begin a round's merge."""

    def add(self, state: State, update: Update) -> State:
        """Merge one update."""

    def finish(self, state: State) -> Leaves:
        """The new global leaves."""


class Rule:
    """Defaults shared by all rules: all leaves travel, the client needs no advice, nothing is remembered."""

    name: ClassVar[str] = ""
    capability: ClassVar[Capability]

    def travelling(self, spec: Spec, round: int = 0) -> tuple[str, ...]:
        """Names of the leaves that travel in this round, both ways."""
        return tuple(spec.leaves)

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """What the client's training must do for this rule; flat, fit for a Flower ConfigRecord."""
        return {}

    def init(
        self,
        spec: Spec,
        *,
        current: Leaves | None = None,
        memory: Leaves | None = None,
        round: int = 0,
    ) -> State:
        """Begin a round's merge.

        Args:
            spec: of all leaves of the adapter; the rule restricts it to what travels.
            current: the global leaves the clients started from; rules that work on changes need them.
            memory: what `memory` gave after the round before.
            round: the round being merged.
        """
        return State(spec=spec, round=round, current=current, memory=dict(memory or {}))

    def add(self, state: State, update: Update) -> State:
        """Merge one validated update. Leaves the state as it was when it raises `Refusal`."""
        raise NotImplementedError

    def finish(self, state: State) -> Leaves:
        """The new global leaves, once per state. Raises RunError when nothing was merged."""
        raise NotImplementedError

    def memory(self, state: State) -> Leaves:
        """After ``finish``: named tensors that the next round needs, for the checkpoint."""
        return {}

    def downlink(self, memory: Mapping[str, Tensor]) -> Leaves:
        """What travels to every client besides the leaves: control variates, residuals. By default nothing."""
        return {}

    def for_client(
        self,
        leaves: Leaves,
        spec: Spec,
        *,
        ranks: Mapping[str, int] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Leaves:
        """The global leaves in the form of one client: its ranks, its scales.

        Args:
            leaves: global leaves.
            spec: of the global leaves.
            ranks: site to the client's rank; a site not named has the global rank.
            scales: site to the client's scale; a site not named has the global scale.

        Raises:
            ConfigError: the rule cannot serve a rank other than the global one.
        """
        for site, rank in (ranks or {}).items():
            if rank != spec.rank(site):
                raise ConfigError(
                    f"rule {self.name!r} cannot serve rank {rank} at site {site}: "
                    f"the global rank is {spec.rank(site)}; use flexlora, hetlora or nested"
                )
        return rescaled(leaves, spec, {k: spec.products[k].scale / v for k, v in (scales or {}).items()})


def rescaled(leaves: Leaves, spec: Spec, factors: Mapping[str, float]) -> Leaves:
    """Multiply each named site's product by a factor, on the factor that starts at zero."""
    out = dict(leaves)
    for site, factor in factors.items():
        product = spec.products[site]
        name = product.left if product.down != "left" else product.right
        if factor != 1.0 and name in out:
            out[name] = out[name] * factor
    return out


def as_dtypes(leaves: Mapping[str, Tensor], spec: Spec) -> Leaves:
    """Cast leaves to the dtypes of the specification."""
    return {name: leaf.to(spec.leaves[name].dtype) for name, leaf in leaves.items()}
