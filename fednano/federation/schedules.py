"""What the server changes from round to round: the clients' learning rate, and the adapters' rank.

Both are functions of the settings and the round's number alone, so a resumed run follows the same course.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fednano.aggregation import Rule, Spec
from fednano.aggregation.products import served
from fednano.aggregation.server_opt import ServerOptimiser
from fednano.errors import ConfigError
from fednano.federation.config import RunConfig
from fednano.models.edge import NanoEdge

__all__ = ["at_rank", "check_schedules", "fit_rank", "learning_rate_at", "rank_at"]


def learning_rate_at(config: RunConfig, number: int) -> float:
    """The clients' learning rate in a round: from ``learning-rate`` in the first to ``lr-final`` of it in the last."""
    if config.lr_schedule == "constant" or config.rounds == 1:
        return config.learning_rate
    done = (number - 1) / (config.rounds - 1)
    left = 1.0 - done if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (config.lr_final + (1.0 - config.lr_final) * left)


def rank_at(config: RunConfig, number: int) -> int:
    """The adapters' rank in a round: that of the schedule's last step so far, ``rank`` before the first."""
    steps = [(start, rank) for start, rank in config.rank_steps if start <= number]
    return max(steps)[1] if steps else config.rank


def check_schedules(rule: Rule, config: RunConfig) -> None:
    """Refuse a rank schedule where something of the old rank would have to be carried over.

    Raises:
        ConfigError: with the reason.
    """
    if not config.rank_steps:
        return
    asked = set(rule.client_config(1))
    kept = asked & {"control_variates", "personal", "personal_adapter"}
    moments = isinstance(rule, ServerOptimiser) and bool(rule.moments)
    if kept or moments:
        what = "moments" if moments else ", ".join(sorted(kept))
        raise ConfigError(
            f"rule {rule.name!r} carries tensors of the adapters' rank from round to round ({what}), so the rank "
            "cannot change. Leave rank-schedule empty, or choose a rule such as 'flexlora'."
        )


def at_rank(edge: NanoEdge, spec: Spec, leaves: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The adapters at another rank; ``edge`` has that rank afterwards.

    Products are cut to their best approximation; growing adds what is silent until it is trained.

    Args:
        edge: any NanoEdge with adapters of the run's family.
        spec: of the leaves.
        leaves: at their present rank.
        rank: the new one.

    Raises:
        ConfigError: the adapter has no rank that can change, or the new one does not fit.
    """
    smaller = {site: rank for site in spec.products if rank < spec.rank(site)}
    begin = served(dict(leaves), spec, smaller, None, "rank-schedule") if smaller else leaves
    fit_rank(edge, begin)
    edge.load_travelling(begin)
    if not smaller:
        for stream in edge.layers:
            edge.layer(stream).resize(rank)
    return edge.travelling()


def fit_rank(edge: NanoEdge, leaves: Mapping[str, Tensor]) -> None:
    """Give the adapters of ``edge`` the rank that ``leaves`` have; what they hold then is to be replaced.

    Leaves that fit no rank are left to :meth:`NanoEdge.load_travelling`, which says what is wrong with them.
    """
    for stream in edge.layers:
        layer = edge.layer(stream)
        for name, leaf in layer.leaves().items():
            got = leaves.get(f"{stream}.{name}")
            if got is None or got.ndim != len(leaf.shape) or tuple(got.shape) == leaf.shape:
                continue
            present = getattr(layer.adapter, getattr(layer.adapter, "size_option", "rank"), None)
            for have, want in zip(leaf.shape, got.shape, strict=True):
                if have != want and have == present:
                    layer.resize(int(want))
                    break
            break
