"""Which rule fits which adapter and which protection: the table users see, and the refusals at start.

Everything is decided from the `Capability` that each rule declares, so the table and the refusals cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from fednano.aggregation.registry import rule_class, rule_names
from fednano.aggregation.rule import Rule
from fednano.aggregation.server_opt import ServerOptimiser
from fednano.errors import ConfigError

__all__ = ["ALGEBRAS", "algebra_name", "check_combination", "default_rule", "rule_table"]

ALGEBRAS = ("affine", "multilinear", "nonlinear")

# Affine: the mean is exact. Products of equal rank: the mean of the factors is not, but it did better than the exact
# product cut back to its rank wherever `simulations/study.py` compared them. Non-linear: neither is exact.
_DEFAULTS = {"affine": "fedavg", "multilinear": "fedavg", "nonlinear": "fedavg"}
_DEFAULT_OF_MIXED_RANKS = "flexlora"  # factors of different ranks have no mean


def algebra_name(algebra: str | Enum) -> str:
    """The word for an algebra, given as a word or as an enum whose value is the word.

    Raises:
        ConfigError: not one of `ALGEBRAS`.
    """
    word = str(algebra.value if isinstance(algebra, Enum) else algebra).lower()
    if word not in ALGEBRAS:
        raise ConfigError(f"algebra: got {algebra!r}, expected one of {', '.join(ALGEBRAS)}")
    return word


def default_rule(algebra: str | Enum, *, ranks_differ: bool = False) -> str:
    """The rule that a run uses unless told otherwise, ``auto``.

    Args:
        algebra: of the adapter.
        ranks_differ: clients will have different ranks.

    Raises:
        ConfigError: not one of `ALGEBRAS`.
    """
    word = algebra_name(algebra)
    return _DEFAULT_OF_MIXED_RANKS if ranks_differ and word == "multilinear" else _DEFAULTS[word]


def check_combination(
    rule: Rule | str,
    algebra: str | Enum,
    *,
    secure_aggregation: bool = False,
    differential_privacy: bool = False,
    ranks_differ: bool = False,
    products: bool | None = None,
    codec: str = "none",
    late: bool = False,
) -> None:
    """Refuse, before a run starts, a combination that cannot be right.

    Args:
        rule: a rule or its name.
        algebra: of the adapter.
        secure_aggregation: the server will see nothing but sums.
        differential_privacy: one client's influence must be bounded.
        ranks_differ: clients will have different ranks.
        products: whether the adapter's leaves form products; None: not known, not checked.
        codec: what encodes the uplink, see `codecs`.
        late: updates of earlier rounds will be merged, too.

    Raises:
        ConfigError: with the reason, and with rules that would do.
    """
    if isinstance(rule, ServerOptimiser):
        # What matters is how the change below it is merged; the step itself is harmless, but for one that depends on
        # the single clients.
        check_combination(
            rule.over,
            algebra,
            secure_aggregation=secure_aggregation,
            differential_privacy=differential_privacy,
            ranks_differ=ranks_differ,
            products=products,
            codec=codec,
            late=late,
        )
        if not rule.measures_clients:
            return
    name = rule if isinstance(rule, str) else rule.name
    word = algebra_name(algebra)
    asked: dict[str, bool] = {
        "secure_aggregation": secure_aggregation,
        "differential_privacy": differential_privacy,
        "ranks": ranks_differ,
        "late": late,
    }
    reason = _objection(name, word, asked, products, codec)
    if reason:
        fits = [other for other in rule_names() if not _objection(other, word, asked, products, codec)]
        raise ConfigError(f"rule {name!r} {reason}. Rules that fit: {', '.join(fits) if fits else 'none'}")


def _objection(name: str, algebra: str, asked: Mapping[str, bool], products: bool | None, codec: str) -> str:
    can = rule_class(name).capability
    objections = (
        (algebra not in can.allowed, f"does not fit a {algebra} adapter: it computes {can.exact_note}"),
        (
            products is False and "products" in can.needs,
            "merges products of two leaves, and this adapter's leaves form none",
        ),
        (
            asked["secure_aggregation"] and not can.secure_aggregation,
            "needs each client's update in the clear, and secure aggregation shows the server nothing but sums",
        ),
        (
            asked["differential_privacy"] and not can.differential_privacy,
            "does not bound one client's influence on what is published, which differential privacy needs",
        ),
        (asked["ranks"] and not can.ranks, "cannot merge clients of different ranks"),
        (
            asked["late"] and not can.late,
            "ties each update to its own round, so late ones cannot be buffered; drop them",
        ),
        (codec in can.codecs_refused, f"cannot bear codec {codec!r}: {can.codecs_note}"),
    )
    return next((reason for applies, reason in objections if applies), "")


def rule_table() -> list[dict[str, str]]:
    """One row per rule, in words, for `fednano strategies` and the documentation."""
    rows = []
    for name in rule_names():
        can = rule_class(name).capability

        def yes(flag: bool) -> str:
            return "yes" if flag else "no"

        rows.append(
            {
                "rule": name,
                "summary": can.summary,
                "exact for": ", ".join(a for a in ALGEBRAS if a in can.exact) or "none",
                "computes": can.exact_note,
                "adapters": ", ".join(a for a in ALGEBRAS if a in can.allowed),
                "up": can.bytes_up,
                "down": can.bytes_down,
                "streams": yes(can.streaming),
                "secure aggregation": yes(can.secure_aggregation),
                "differential privacy": yes(can.differential_privacy),
                "different ranks": yes(can.ranks),
                "late updates": yes(can.late),
                "codecs": f"all but {', '.join(sorted(can.codecs_refused))}" if can.codecs_refused else "all",
                "needs": ", ".join(sorted(can.needs)) or "leaves",
                "arXiv": can.paper,
            }
        )
    return rows
