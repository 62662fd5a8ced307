"""What a run promised its clients about their updates, and a job cannot keep."""

from __future__ import annotations

from fednano.errors import RunError
from fednano.federation.config import RunConfig

__all__ = ["lost_protection", "require_unprotected"]


def lost_protection(config: RunConfig) -> tuple[str, ...]:
    """Protections of the run's updates that those of an unlearning job lack, for people and the receipt.

    A job needs the owner's update by itself, and what one client asks to forget cannot be hidden among the others'
    updates; noise would have to be accounted for anew. Sums alone (secure aggregation, Bonawitz et al., CCS 2017) and a
    differential privacy budget therefore end where a job begins.

    Args:
        config: the run's settings.
    """
    found = []
    if config.secure_aggregation:
        found.append("secure aggregation: the server sees each party's update of the job by itself")
    if config.dp != "off":
        found.append(
            "differential privacy: updates of the job carry no noise, and its budget does not cover them"
        )
    return tuple(found)


def require_unprotected(config: RunConfig, *, allowed: bool) -> tuple[str, ...]:
    """`lost_protection`, if there is none or the operator allows it.

    Raises:
        RunError: the run's updates were protected; jobs stay in the queue.
    """
    lost = lost_protection(config)
    if lost and not allowed:
        raise RunError(
            f"the run's updates were protected, those of an unlearning job are not ({'; '.join(lost)}). Ask the sites, "
            "then allow it: fednano unlearn run --allow-unprotected. The jobs stay in the queue."
        )
    return tuple(f"unprotected updates, allowed by the operator: {each}" for each in lost)
