"""Late updates: how much they count, and onto what (FedBuff, arXiv 2106.06639).

A buffered update was trained from an older adapter. What it learned is its change, so it is moved onto the
current adapter, and its weight falls with its age.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

from dataclasses import replace

from fednano.aggregation.update import Leaves, Refusal, Update
from fednano.errors import ConfigError

__all__ = ["freshen", "staleness_weight"]


def staleness_weight(staleness: int, exponent: float = 0.5) -> float:
    """``(1 + staleness) ** -exponent``.

    Args:
        staleness: rounds between the adapter it was trained from and the current one, not negative.
        exponent: 0 ignores age; 0.5 as in FedBuff.
    """
    if staleness < 0 or exponent < 0.0:
        raise ConfigError(
            f"staleness: got {staleness} rounds and exponent {exponent}, expected neither negative"
        )
    return float((1.0 + staleness) ** -exponent)


def freshen(
    update: Update, started_from: Leaves, current: Leaves, round: int, exponent: float = 0.5
) -> Update:
    """A late update as one of this round: its change on the current leaves, its weight by its age.

    Args:
        update: of an earlier round.
        started_from: the leaves it was trained from.
        current: the leaves of this round.
        round: this round.
        exponent: see `staleness_weight`.

    Raises:
        Refusal: "round" when it is of a later round; "schema" when a leaf changed its shape since.
    """
    age = round - update.round
    if age < 0:
        raise Refusal("round", f"trained for round {update.round}, this is round {round}", update.client)
    moved = {}
    for name, leaf in update.leaves.items():
        if (
            name not in current
            or name not in started_from
            or not leaf.shape == current[name].shape == started_from[name].shape
        ):
            raise Refusal(
                "schema", f"leaf {name} changed its shape since round {update.round}", update.client
            )
        moved[name] = (current[name].double() + (leaf.double() - started_from[name].double())).to(leaf.dtype)
    return replace(update, round=round, leaves=moved, weight=update.weight * staleness_weight(age, exponent))
