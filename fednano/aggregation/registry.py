"""Rules by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from fednano.aggregation.clip import NormClip
from fednano.aggregation.drift import QFedAvg, Scaffold
from fednano.aggregation.factors import FFA, FedDPA, FedSA, RoLoRA
from fednano.aggregation.fisher import FisherMerge
from fednano.aggregation.geomedian import GeometricMedian
from fednano.aggregation.mean import FedAvg, FedProx
from fednano.aggregation.products import ProductMean
from fednano.aggregation.ranks import HetLoRA, NestedRanks
from fednano.aggregation.residual import FedEx, FLoRA
from fednano.aggregation.robust import Bulyan, Krum, Median, MultiKrum, TrimmedMean
from fednano.aggregation.rule import Rule
from fednano.aggregation.server_opt import FedAdagrad, FedAdam, FedAvgM, FedExP, FedYogi
from fednano.aggregation.sparse import Dare, DareTies, Ties
from fednano.errors import ConfigError, did_you_mean

__all__ = ["create_rule", "rule_class", "rule_names"]

_ALL: tuple[type[Rule], ...] = (
    *(FedAvg, FedProx, FisherMerge),
    *(FedAvgM, FedAdam, FedYogi, FedAdagrad, FedExP),
    *(Scaffold, QFedAvg),
    *(FFA, RoLoRA, FedSA, FedDPA),
    *(ProductMean, FedEx, FLoRA, HetLoRA, NestedRanks),
    *(Krum, MultiKrum, Median, TrimmedMean, Bulyan, NormClip, GeometricMedian),
    *(Ties, Dare, DareTies),
)
_RULES: dict[str, type[Rule]] = {rule.name: rule for rule in _ALL}
_ALIASES = {"hlora": "flexlora"}  # the same mean, published twice


def rule_names() -> list[str]:
    """Names of all rules, sorted."""
    return sorted(_RULES)


def rule_class(name: str) -> type[Rule]:
    """The class of a rule.

    Raises:
        ConfigError: no rule has that name.
    """
    name = _ALIASES.get(name, name)
    if name not in _RULES:
        hint = did_you_mean(name, rule_names())
        raise ConfigError(
            f"no aggregation rule is called {name!r}.{hint} There are: {', '.join(rule_names())}"
        )
    return _RULES[name]


def create_rule(name: str, **options: Any) -> Rule:
    """A rule by name.

    Args:
        name: one of `rule_names`.
        options: the rule's own options; see its class.

    Raises:
        ConfigError: unknown name, unknown option, or an option out of range.
    """
    cls = rule_class(name)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # every rule is a dataclass
    unknown = sorted(set(options) - known)
    if unknown:
        has = ", ".join(sorted(known)) if known else "none"
        hint = did_you_mean(unknown[0], known)
        raise ConfigError(f"rule {name!r} has no option {', '.join(unknown)}.{hint} Its options: {has}")
    return cls(**options)
