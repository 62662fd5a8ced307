"""What the worker asks of whoever does the unlearning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fednano.errors import FednanoError
from fednano.unlearning.jobs.request import Plan

__all__ = ["OwnerOffline", "Result", "Round", "Runner", "Task"]


class OwnerOffline(FednanoError):
    """The owner's data cannot be reached now; the job waits in the queue."""


@dataclass(frozen=True)
class Task:
    """What a runner is to do.

    Attributes:
        run: the run folder.
        site: the owner.
        samples: ids to forget, all of them trained on; empty where only the site knows them.
        plan: how.
        withheld: ids that the requests name, but that no round has trained on: nothing is to be learnt from them.
        requests: the signed requests.
        salt: with which the ids in them are hashed, hexadecimal.
    """

    run: Path
    site: str
    samples: tuple[str, ...]
    plan: Plan
    withheld: tuple[str, ...] = ()
    requests: tuple[dict[str, Any], ...] = ()
    salt: str = ""


@dataclass(frozen=True)
class Round:
    """What was measured in one round; ``None`` where it was not.

    Attributes:
        number: from 1.
        of: most rounds.
        ihl: inverted hinge loss on the forget set, in [0, 2].
        retain_loss: cross-entropy on retained data, nats a token.
        el: extraction likelihood EL_10, in [0, 1].
        ma: memorisation accuracy, in [0, 1].
        utility: mean answer probability on the test questions.
    """

    number: int
    of: int
    ihl: float | None = None
    retain_loss: float | None = None
    el: float | None = None
    ma: float | None = None
    utility: float | None = None


@dataclass(frozen=True)
class Result:
    """What a runner hands back.

    Attributes:
        payload: the shadow adapter, as a safetensors file.
        info: what changes in the adapter's description (``adapter.json``).
        before: figures of the adapter before, by name.
        after: the same figures of the shadow adapter.
        reference: the same figures of what it is compared with; empty where there is none.
        reference_kind: what that is, such as ``"retrained"``; empty where there is none.
        thresholds: what the stop rule compared with, by name.
        seconds: wall time.
        client_seconds: of all parties together.
        bytes: bytes that crossed the wire.
        rounds: rounds done.
        stopped: why it stopped, such as ``"forgotten"`` or ``"rounds"``.
        accepted: whether the stop rule's goals and the utility floor are met.
        reasons: why not, for people.
        approximations: names of what was approximated.
        samples: how many were forgotten, where the worker does not know their ids.
        statement: the owner's own signed statement of its figures; empty where there is none.
        facts: what became known of the scope, to keep with the jobs.
        probes: what `fednano.unlearning.probes` found, by name; empty where none was asked for.
        earlier: earlier job to what the shadow adapter knows of its samples; ``None``: out of reach.
    """

    payload: bytes
    info: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    reference_kind: str = ""
    thresholds: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    client_seconds: float = 0.0
    bytes: int = 0
    rounds: int = 0
    stopped: str = ""
    accepted: bool = True
    reasons: tuple[str, ...] = ()
    approximations: tuple[str, ...] = ()
    samples: int = 0
    statement: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Any] = field(default_factory=dict)
    earlier: Mapping[str, Any] = field(default_factory=dict)


class Runner(Protocol):
    """What unlearns. It must not write to the run folder."""

    def __call__(self, task: Task, *, progress: Callable[[Round], None], stop: Callable[[], bool]) -> Result:
        """Unlearn ``task``.

        Raises:
            OwnerOffline: the owner's data cannot be reached now.
            Interrupted: ``stop`` said so.
            FednanoError: it cannot be done; the job fails with the message.
        """
        ...
