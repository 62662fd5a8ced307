"""What a live job asks of a site. All sites get the same kind of message; only the owner's says what to forget."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fednano.errors import ConfigError
from fednano.federation.config import Scalar
from fednano.unlearning.local import LocalSettings

__all__ = ["NAME", "Ask", "Forget"]

NAME = "unlearn"
"""Name of the messages, and key of the advice in them."""


@dataclass(frozen=True)
class Forget:
    """What the owner alone is told.

    Attributes:
        method: a name of `fednano.unlearning.methods`.
        salt: with which the ids in the requests are hashed, hexadecimal.
        requests: the requests as the site signed them.
        rounds: rounds of the run that merged an update of the site.
        epoch: of the run's tombstones.
    """

    method: str
    salt: str
    requests: tuple[dict[str, Any], ...]
    rounds: tuple[int, ...]
    epoch: int

    @property
    def hashes(self) -> frozenset[str]:
        """Salted hashes of all samples that the requests name."""
        return frozenset(each for envelope in self.requests for each in envelope["request"]["ids"])


@dataclass(frozen=True)
class Ask:
    """One request to one site.

    Attributes:
        task: ``"scope"``, ``"fisher"``, ``"train"``, ``"probe"`` or ``"measure"``.
        seed: of the job.
        settings: how it trains in a round.
        fisher_samples: most samples of each kind in a Fisher.
        forget: for the owner.
        sign: whether the owner is to sign what it measures.
    """

    task: str
    seed: int
    settings: LocalSettings
    fisher_samples: int
    forget: Forget | None = None
    sign: bool = False

    def to_advice(self) -> dict[str, Scalar]:
        """As the advice of an instruction."""
        return {NAME: json.dumps(asdict(self))}

    @classmethod
    def from_advice(cls, advice: dict[str, Scalar]) -> Ask:
        """Inverse of :meth:`to_advice`.

        Raises:
            ConfigError: the request is of another version.
        """
        try:
            body: dict[str, Any] = json.loads(str(advice[NAME]))
            forget = body.pop("forget")
            settings = LocalSettings(**body.pop("settings"))
            if forget is not None:
                forget = Forget(
                    **{**forget, "requests": tuple(forget["requests"]), "rounds": tuple(forget["rounds"])}
                )
            return cls(settings=settings, forget=forget, **body)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the server's unlearning request cannot be read ({error!r}). Give server and client the same version."
            ) from error
