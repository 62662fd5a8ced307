"""Clients that misbehave on purpose, to see what a merge rule and the checks of updates withstand.

The setting ``faults`` names them: ``'sign-flip:2:4,vanish:0.3'`` is two clients that send four times the opposite of
what they learned, and three in ten of all clients that do not answer, others each round. Who it is follows from the
seed. The server tells the clients in its requests, and only simulated clients obey: a client with data of its own
refuses.

=========  =================================================================================================
fault      what the client sends
=========  =================================================================================================
sign-flip  its change times ``-strength`` (default 1), as in arXiv 1811.03761
noise      normal noise as long as its change times ``strength`` (default 1), instead of the change
nan        NaN in every element
huge       1e30 in every element
stale      its update under the number of the round before
foreign    its update under the fingerprint of another model
vanish     nothing; the number is the share of the clients, drawn anew in each round
=========  =================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fednano.errors import ConfigError

__all__ = ["Fault", "check_faults", "parse_faults"]

_CHANGES = ("sign-flip", "noise")
_KINDS = (*_CHANGES, "nan", "huge", "stale", "foreign", "vanish")


@dataclass(frozen=True)
class Fault:
    """One kind of misbehaviour.

    Attributes:
        kind: see the module.
        amount: how many clients; for ``vanish`` their share.
        strength: factor on the change.
    """

    kind: str
    amount: float
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}" + (f":{self.strength!r}" if self.kind in _CHANGES else "")


def parse_faults(text: str) -> list[Fault]:
    """``'sign-flip:1,vanish:0.3'`` as faults.

    Raises:
        ConfigError: an unknown kind, or an amount or a strength that makes no sense.
    """
    return [_parse(part.strip()) for part in text.split(",") if part.strip()]


def _parse(part: str) -> Fault:
    kind, *numbers = part.split(":")
    try:
        fault = Fault(kind, *(float(number) for number in numbers))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"faults has {part!r}; expected KIND:CLIENTS or KIND:CLIENTS:STRENGTH, such as 'sign-flip:1:4'."
        ) from error
    if kind not in _KINDS:
        raise ConfigError(f"faults has {kind!r}; expected one of {', '.join(_KINDS)}.")
    if kind == "vanish" and not 0.0 < fault.amount < 1.0:
        raise ConfigError(f"faults has {part!r}; expected a share above 0 and below 1, such as 'vanish:0.3'.")
    if kind != "vanish" and not (fault.amount >= 1.0 and fault.amount == int(fault.amount)):
        raise ConfigError(f"faults has {part!r}; expected a whole number of clients, such as '{kind}:1'.")
    if len(numbers) > 1 and kind not in _CHANGES:
        raise ConfigError(f"faults has {part!r}; only {' and '.join(_CHANGES)} have a strength.")
    if not 0.0 < fault.strength < math.inf:
        raise ConfigError(f"faults has {part!r}; expected a strength above 0.")
    return fault


def check_faults(faults: Sequence[Fault], clients: int, *, simulated: bool) -> None:
    """Refuse faults at real sites, and more of them than there are clients.

    Raises:
        ConfigError: with the reason.
    """
    if not faults:
        return
    if not simulated:
        raise ConfigError(
            "faults are for simulations, and these clients hold data of their own. Leave faults empty."
        )
    lasting = sum(int(fault.amount) for fault in faults if fault.kind != "vanish")
    if lasting >= clients:
        raise ConfigError(f"faults wants {lasting} clients of {clients}; leave at least one honest.")
