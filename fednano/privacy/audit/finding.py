"""One line of an audit."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """How well one attack works in one setting.

    Attributes:
        attack: what is attacked, by what.
        attacker: who can do it, and what it knows.
        setting: what is on the wire.
        measure: what ``value`` is.
        value: the result of the attack.
        chance: what the same measure gives who has seen nothing.
        cases: tokens, images, clients or samples that were attacked.
    """

    attack: str
    attacker: str
    setting: str
    measure: str
    value: float
    chance: float
    cases: int
