"""The table of rules and the refusals that follow from it."""

from __future__ import annotations

import dataclasses
from enum import Enum

import pytest
import torch

from fednano.aggregation import (
    LeafSpec,
    Product,
    Spec,
    Update,
    check_combination,
    create_rule,
    default_rule,
    rule_class,
    rule_names,
    rule_table,
)
from fednano.aggregation.rule import Seen
from fednano.errors import ConfigError


class Algebra(Enum):
    AFFINE = "affine"
    MULTILINEAR = "multilinear"
    NONLINEAR = "nonlinear"


def test_every_rule_of_the_issue_exists() -> None:
    wanted = {
        *(
            "fedavg",
            "fedprox",
            "scaffold",
            "fedavgm",
            "fedadam",
            "fedyogi",
            "fedadagrad",
            "fedexp",
            "qfedavg",
            "fisher",
        ),
        *("ffa", "rolora", "fedsa", "feddpa", "flora", "flexlora", "hetlora", "fedex", "nested"),
        *("krum", "multikrum", "median", "trimmed", "bulyan", "normclip", "geomedian", "ties", "dare"),
    }
    assert wanted <= set(rule_names())
    assert create_rule("hlora").name == "flexlora"


def test_table_names_every_rule_in_words() -> None:
    table = rule_table()
    assert [row["rule"] for row in table] == rule_names()
    for row in table:
        assert all(isinstance(v, str) for v in row.values())
        assert all(row[column] for column in ("summary", "computes", "up", "down"))
    by = {row["rule"]: row for row in table}
    assert by["fisher"]["secure aggregation"] == "yes"
    assert by["krum"]["secure aggregation"] == "no"
    assert by["flexlora"]["exact for"] == "affine, multilinear"


@pytest.mark.parametrize(
    ("rule", "algebra", "options", "reason"),
    [
        ("krum", "affine", {"secure_aggregation": True}, "nothing but sums"),
        ("flora", "multilinear", {"secure_aggregation": True}, "nothing but sums"),
        ("ties", "affine", {"differential_privacy": True}, "influence"),
        ("fedavg", "multilinear", {"ranks_differ": True}, "different ranks"),
        ("flexlora", "nonlinear", {}, "does not fit a nonlinear"),
        ("ffa", "affine", {}, "does not fit"),
        ("rolora", "multilinear", {"products": False}, "form none"),
        ("fedexp", "affine", {"secure_aggregation": True}, "nothing but sums"),
        (create_rule("fedexp", over="flexlora"), "multilinear", {"ranks_differ": True}, "different ranks"),
        (create_rule("fedadam", over="krum"), "affine", {"secure_aggregation": True}, "nothing but sums"),
    ],
)
def test_refused_combinations(rule, algebra, options, reason) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=reason) as refused:
        check_combination(rule, algebra, **options)
    suggested = str(refused.value).split("Rules that fit: ")[1].split(", ")
    assert suggested
    for name in suggested:  # what is suggested is itself accepted
        check_combination(name, algebra, **options)


@pytest.mark.parametrize("algebra", list(Algebra))
def test_defaults_fit(algebra: Algebra) -> None:
    check_combination(default_rule(algebra), algebra)
    check_combination(create_rule("fedadam", over="fisher"), algebra, secure_aggregation=True)
    assert default_rule(algebra.value) == default_rule(algebra)


def test_names_of_clients_are_kept_small() -> None:
    seen = Seen()
    for k in range(500):
        seen.add(f"client-{k}")
        seen.add(f"client-{k}")
    assert len(seen) == 500
    assert all(f"client-{k}" in seen for k in range(500))
    assert "client-500" not in seen


def test_unknown_algebra() -> None:
    with pytest.raises(ConfigError, match="algebra"):
        default_rule("linear")


@pytest.mark.parametrize("name", rule_names())
def test_streaming_rules_hold_no_updates_and_others_do(make_spec, make_updates, name) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(d=6, rank=2)
    rule = create_rule(name)
    updates = make_updates(spec, 7, fisher=True)
    state = rule.init(spec, current=updates[0].leaves, round=3)
    for u in updates:
        rule.add(state, u)
    assert (len(state.held) == 0) == rule_class(name).capability.streaming
    leaves = rule.finish(state)
    assert set(leaves) == set(spec.leaves)
    assert all(
        leaves[n].dtype == s.dtype and tuple(leaves[n].shape) == s.shape for n, s in spec.leaves.items()
    )
    assert all(torch.isfinite(t).all() for t in leaves.values())
    assert all(isinstance(t, torch.Tensor) for t in rule.memory(state).values())
    assert all(isinstance(v, str | int | float | bool) for v in rule.client_config(3).values())


PLAIN = [
    n
    for n in rule_names()
    if "affine" in rule_class(n).capability.exact and "products" not in rule_class(n).capability.needs
]


@pytest.mark.parametrize("name", PLAIN)  # the exactness of products is measured in test_products
def test_what_is_declared_exact_for_affine_adapters_is(make_updates, name) -> None:  # type: ignore[no-untyped-def]
    """An affine adapter's delta is linear in its leaves: merging leaves must be merging deltas, with equal Fishers."""
    spec = Spec({"r": LeafSpec((5, 5), torch.float64)}, algebra="affine")
    updates = make_updates(spec, 4)
    same = {"r": torch.rand(5, 5, dtype=torch.float64) + 0.1}
    updates = [dataclasses.replace(u, fisher=same) for u in updates]
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(9, 5, generator=g).double(), torch.randn(5, 8, generator=g).double()
    rule = create_rule(name)
    state = rule.init(spec, current={"r": torch.zeros(5, 5, dtype=torch.float64)})
    for u in updates:
        rule.add(state, u)
    total = sum(u.weight for u in updates)
    want = sum(u.weight / total * left @ u.leaves["r"] @ right for u in updates)
    assert torch.allclose(left @ rule.finish(state)["r"] @ right, want, atol=1e-6)


def test_ranks_capability_is_true_to_behaviour() -> None:
    """Rules that declare different ranks merge them; the others refuse or fail loudly."""
    spec = Spec(
        {"q.A": LeafSpec((4, 8), torch.float64), "q.B": LeafSpec((6, 4), torch.float64)},
        products={"q": Product("q.B", "q.A")},
        rank_limit=4,
    )
    g = torch.Generator().manual_seed(0)
    current = {n: torch.randn(s.shape, generator=g).double() for n, s in spec.leaves.items()}
    for name in rule_names():
        if not rule_class(name).capability.ranks:
            continue
        rule = create_rule(name)
        state = rule.init(spec, current=current)
        for k, r in enumerate((2, 4)):
            leaves = {
                "q.A": torch.randn(r, 8, generator=g).double(),
                "q.B": torch.randn(6, r, generator=g).double(),
            }
            rule.add(state, Update(f"c{k}", 0, 1.0, leaves))
        merged = rule.finish(state)
        assert merged["q.A"].shape == (4, 8)
        small = rule.for_client(merged, spec, ranks={"q": 2})
        assert small["q.A"].shape == (2, 8)
        assert small["q.B"].shape == (6, 2)


def test_a_server_optimiser_hands_on_what_the_rule_below_sends() -> None:
    leaves = {"t.A": torch.randn(8, 4), "t.B": torch.zeros(4, 8)}
    spec = Spec(
        leaves={name: LeafSpec(tuple(leaf.shape)) for name, leaf in leaves.items()},
        products={"t": Product("t.A", "t.B", down="left")},
    )
    over = create_rule("fedavgm", over="flexlora")
    served = over.for_client(leaves, spec, ranks={"t": 2})
    assert served["t.A"].shape == (8, 2)
    assert (
        torch.linalg.matrix_rank(served["t.A"]) == 2
    )  # a product of no rank yet leaves factors that can learn
    assert not served["t.B"].any()
    control = {"over/c/t.A": torch.ones(8, 4, dtype=torch.float64), "m/t.A": torch.zeros(8, 4)}
    assert set(create_rule("fedavgm", over="scaffold").downlink(control)) == {"control/t.A"}


@pytest.mark.parametrize(
    ("rule", "asked", "reason"),
    [
        ("rolora", {"late": True}, "cannot be buffered"),
        ("ties", {"codec": "sign"}, "one bit has none"),
        ("fedavgm", {"codec": "topk"}, ""),
    ],
)
def test_late_updates_and_codecs(rule: str, asked: dict[str, object], reason: str) -> None:
    if not reason:
        check_combination(rule, "multilinear", **asked)  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=reason):
        check_combination(rule, "multilinear", **asked)  # type: ignore[arg-type]
