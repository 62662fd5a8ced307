"""Robust rules against Flower's numpy, TIES against PEFT, and all of them against clients that lie."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.aggregation import LeafSpec, Leaves, Product, Rule, Spec, Update, create_rule
from fednano.aggregation.distances import gram_matrix, krum_scores, squared_distances
from fednano.aggregation.sparse import dare_mask, elect, trim
from fednano.errors import ConfigError, RunError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp import strategy as flower

ROBUST: list[tuple[str, dict[str, Any]]] = [
    ("krum", {"malicious": 2}),
    ("multikrum", {"malicious": 2}),
    ("median", {}),
    ("trimmed", {"beta": 0.25}),
    ("bulyan", {"malicious": 2}),
    ("geomedian", {}),
    ("geomedian", {"space": "product"}),
    ("normclip", {"bound": 2.0}),
]


def merge(rule: Rule, spec: Spec, updates: list[Update], **init: Any) -> tuple[Leaves, Any]:
    state = rule.init(spec, round=3, **init)
    for u in updates:
        rule.add(state, u)
    return rule.finish(state), state


@pytest.mark.parametrize(
    ("name", "options", "strategy"),
    [
        ("krum", {"malicious": 2, "space": "leaves"}, lambda: flower.Krum(num_malicious_nodes=2)),
        (
            "multikrum",
            {"malicious": 2, "keep": 5, "space": "leaves"},
            lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
        ),
        ("bulyan", {"malicious": 2, "space": "leaves"}, lambda: flower.Bulyan(num_malicious_nodes=2)),
        ("median", {}, flower.FedMedian),
        ("trimmed", {"beta": 0.2}, lambda: flower.FedTrimmedAvg(beta=0.2)),
    ],
)
@pytest.mark.parametrize("clients", [11, 12])
def test_against_flower(monkeypatch, make_spec, make_updates, *, name, options, strategy, clients) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # Flower collects after every record: seconds of nothing
    spec = make_spec()
    updates = sorted(make_updates(spec, clients, seed=clients), key=lambda u: u.client)
    theirs = strategy()
    theirs._check_and_log_replies = lambda replies, is_train, validate=True: (list(replies), [])
    replies = [
        SimpleNamespace(
            content=RecordDict(
                {
                    "arrays": ArrayRecord({n: Array(u.leaves[n].numpy()) for n in spec.leaves}),
                    "metrics": MetricRecord({"num-examples": u.weight}),
                }
            )
        )
        for u in updates
    ]
    want, _ = theirs.aggregate_train(1, replies)
    got, _ = merge(create_rule(name, **options), spec, updates)
    for leaf in spec.leaves:
        assert np.allclose(got[leaf].numpy(), want[leaf].numpy(), atol=1e-12)


@pytest.mark.parametrize("make_products", ["nano", "lora"])
def test_gram_distances_are_dense_distances(make_products: str) -> None:
    """Distances in product space, ranks and scales differing, against dense deltas."""
    g = torch.Generator().manual_seed(0)
    sides = ("q.A", "q.B") if make_products == "nano" else ("q.B", "q.A")
    spec = Spec(
        {
            sides[0]: LeafSpec((10, 4), torch.float64),
            sides[1]: LeafSpec((4, 7), torch.float64),
            "bias": LeafSpec((7,), torch.float64),
        },
        products={"q": Product(*sides, 0.5)},
        rank_limit=8,
    )
    updates, dense = [], []
    for k, rank in enumerate((2, 4, 8, 3)):
        left, right = torch.randn(10, rank, generator=g).double(), torch.randn(rank, 7, generator=g).double()
        bias = torch.randn(7, generator=g).double()
        scale = 0.3 + k
        updates.append(
            Update(f"c{k}", 3, 1.0, {sides[0]: left, sides[1]: right, "bias": bias}, scales={"q": scale})
        )
        dense.append(torch.cat([(scale * left @ right).reshape(-1), bias]))
    got = squared_distances(gram_matrix(spec, updates, "product"))
    want = torch.cdist(torch.stack(dense), torch.stack(dense)) ** 2
    assert torch.allclose(got, want, atol=1e-9)
    brute = [sum(sorted(float(want[i, j]) for j in range(4) if j != i)[:1]) for i in range(4)]
    assert torch.allclose(krum_scores(got, 1), torch.tensor(brute).double(), atol=1e-5)


def test_product_space_sees_through_other_factors(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    """A client with the same delta in other factors is near in product space and far in leaf space."""
    spec = make_spec()
    base, *_ = make_updates(spec, 1)
    turn = (
        torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
        * 3.0
    )
    other = {}
    for site in ("image", "text"):
        other[f"{site}.A"] = base.leaves[f"{site}.A"] @ turn
        other[f"{site}.B"] = torch.linalg.solve(turn, base.leaves[f"{site}.B"])
    twin = dataclasses.replace(base, client="twin", leaves=other)
    assert squared_distances(gram_matrix(spec, [base, twin], "product"))[0, 1] < 1e-9
    assert squared_distances(gram_matrix(spec, [base, twin], "leaves"))[0, 1] > 1.0


@pytest.mark.parametrize(("name", "options"), ROBUST)
@pytest.mark.parametrize("attack", ["flip", "huge", "same"])
def test_liars_do_not_move_the_merge(make_spec, make_updates, name, options, attack) -> None:  # type: ignore[no-untyped-def]
    """9 honest clients around one adapter, 2 liars: robust rules stay with the honest ones, FedAvg does not."""
    spec = make_spec()
    centre = make_updates(spec, 1, seed=7)[0].leaves
    noise = make_updates(spec, 11, seed=8, weights=[10.0] * 11)
    updates = []
    for k, u in enumerate(noise):
        if k < 9:
            leaves = {n: centre[n] + 0.05 * t for n, t in u.leaves.items()}
        else:
            leaves = {
                n: {
                    "flip": -20.0 * centre[n].clamp(-1, 1),
                    "huge": 30.0 * torch.tanh(t),
                    "same": torch.full_like(t, 25.0),
                }[attack]
                for n, t in u.leaves.items()
            }
        updates.append(dataclasses.replace(u, leaves=leaves))

    def error(leaves: Leaves) -> float:
        return max(float((leaves[n] - centre[n]).abs().max()) for n in spec.leaves)

    plain, _ = merge(create_rule("fedavg"), spec, updates)
    assert error(plain) > 1.0
    # clipping starts from the current leaves, here those the honest clients started from
    got, _ = merge(create_rule(name, **options), spec, updates, current=centre)
    if options.get("space") == "product" and name == "geomedian":
        for site in ("image", "text"):
            dense = got[f"{site}.A"] @ got[f"{site}.B"] - centre[f"{site}.A"] @ centre[f"{site}.B"]
            assert dense.abs().max() < 1.0
    else:
        assert error(got) < 0.4


@pytest.mark.parametrize(("name", "options"), [*ROBUST, ("ties", {}), ("dare", {}), ("dare_ties", {})])
def test_any_order_gives_the_same_bits(make_spec, make_updates, name, options) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(d=6, rank=2, dtype=torch.float32)
    current = make_updates(spec, 1, seed=5)[0].leaves
    updates = make_updates(spec, 11)
    seen = set()
    for shift, flip in itertools.product(range(0, 11, 3), (1, -1)):
        order = (updates[shift:] + updates[:shift])[::flip]
        got, _ = merge(create_rule(name, **options), spec, order, current=current)
        seen.add(b"".join(got[n].numpy().tobytes() for n in spec.leaves))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["krum", "multikrum", "median", "trimmed", "geomedian"])
def test_one_client_is_the_identity(make_spec, make_updates, name) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    (u,) = make_updates(spec, 1)
    got, _ = merge(create_rule(name), spec, [u])
    assert all(torch.allclose(got[n], u.leaves[n], atol=1e-12) for n in spec.leaves)


def test_geometric_median_minimises_the_sum_of_distances(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(d=4, rank=2)
    updates = make_updates(spec, 7, seed=4)
    got, state = merge(create_rule("geomedian"), spec, updates)

    def cost(leaves: Leaves) -> float:
        return sum(
            u.weight * math.sqrt(sum(float((u.leaves[n] - leaves[n]).square().sum()) for n in leaves))
            for u in updates
        )

    best = cost(got)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        near = {n: t + 1e-3 * torch.randn(t.shape, generator=g, dtype=torch.float64) for n, t in got.items()}
        assert cost(near) > best
    assert 0.0 < state.report["largest_share"] < 1.0
    # three identical updates of five are the median
    same = [
        dataclasses.replace(u, client=f"s{i}", weight=1.0, leaves=updates[0].leaves)
        for i, u in enumerate(updates[:3])
    ]
    others = [dataclasses.replace(u, weight=1.0) for u in updates[3:5]]
    got, _ = merge(create_rule("geomedian"), spec, [*same, *others])
    assert all(torch.allclose(got[n], updates[0].leaves[n], atol=1e-4) for n in got)


def test_clipping_is_its_formula(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    current = make_updates(spec, 1, seed=5)[0].leaves
    updates = make_updates(spec, 4)
    updates[0] = dataclasses.replace(
        updates[0], leaves={n: current[n] + 1e-3 * t for n, t in updates[0].leaves.items()}
    )
    got, state = merge(create_rule("normclip", bound=1.5), spec, updates, current=current)
    total, want = sum(u.weight for u in updates), {n: t.clone() for n, t in current.items()}
    for u in updates:
        norm = math.sqrt(sum(float((u.leaves[n] - current[n]).square().sum()) for n in current))
        for n in current:
            want[n] += u.weight / total * min(1.0, 1.5 / norm) * (u.leaves[n] - current[n])
    assert all(torch.allclose(got[n], want[n], atol=1e-9) for n in want)
    assert state.report["clipped"] == 3.0


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_against_peft(density: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft.utils.merge_utils import ties

        g = torch.Generator().manual_seed(1)
        changes = [torch.randn(13, 9, generator=g, dtype=torch.float64) for _ in range(5)]
        # PEFT's weights do not enter the election and its mean divides by the count: equal at weight one.
        want = ties(changes, torch.ones(5, dtype=torch.float64), density)
    spec = Spec({"v": LeafSpec((13, 9), torch.float64)})
    current = {"v": torch.randn(13, 9, generator=g, dtype=torch.float64)}
    updates = [Update(f"c{k}", 3, 1.0, {"v": current["v"] + c}) for k, c in enumerate(changes)]
    got, _ = merge(create_rule("ties", density=density), spec, updates, current=current)
    assert torch.allclose(got["v"] - current["v"], want, atol=1e-12)


def test_trim_and_elect() -> None:
    assert trim(torch.tensor([1.0, -5.0, 2.0, -3.0]), 0.5).tolist() == [0.0, -5.0, 0.0, -3.0]
    assert trim(torch.tensor([1.0, 1.0]), 0.1).tolist() == [1.0, 0.0]
    changes = torch.tensor([[1.0, 0.0], [-4.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    assert elect(changes, torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)).tolist() == [5.0 / 4.0, 0.0]


def test_dare_keeps_the_expected_change(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(d=40, rank=16)
    current = {n: torch.zeros(s.shape, dtype=s.dtype) for n, s in spec.leaves.items()}
    (u,) = make_updates(spec, 1)
    got, _ = merge(create_rule("dare", density=0.25), spec, [u], current=current)
    kept = got["image.A"] != 0.0
    assert abs(kept.double().mean().item() - 0.25) < 0.06
    assert torch.allclose(got["image.A"][kept], u.leaves["image.A"][kept] * 4.0, atol=1e-7)
    whole, _ = merge(create_rule("dare", density=1.0), spec, [u], current=current)
    assert torch.allclose(whole["image.A"], u.leaves["image.A"], atol=1e-7)
    assert torch.equal(dare_mask((50,), 0.5, "a"), dare_mask((50,), 0.5, "a"))
    assert not torch.equal(dare_mask((50,), 0.5, "a"), dare_mask((50,), 0.5, "b"))
    mean = torch.stack(
        [merge(create_rule("dare", seed=s), spec, [u], current=current)[0]["image.A"] for s in range(200)]
    ).mean(0)
    assert (mean - u.leaves["image.A"]).abs().mean() < 0.1


def test_too_few_updates(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    with pytest.raises(RunError, match="at least 7"):
        merge(create_rule("bulyan", malicious=1), spec, make_updates(spec, 6))
    _, state = merge(create_rule("krum", malicious=2), spec, make_updates(spec, 6))
    assert state.report["too_few"] == 1.0
    for name, _ in ROBUST:
        rule = create_rule(name)
        state = rule.init(spec, current={})
        with pytest.raises(RunError, match="no update"):
            rule.finish(state)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("krum", {"malicious": -1}),
        ("krum", {"keep": 2}),
        ("multikrum", {"keep": -1}),
        ("multikrum", {"space": "x"}),
        ("trimmed", {"beta": 0.5}),
        ("bulyan", {"malicious": -1}),
        ("normclip", {"bound": 0.0}),
        ("geomedian", {"steps": 0}),
        ("geomedian", {"space": "d"}),
        ("ties", {"density": 0.0}),
        ("ties", {"scale": 0.0}),
        ("dare", {"density": 1.5}),
    ],
)
def test_bad_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        create_rule(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("krum", {"malicious": 1}),
        ("multikrum", {"malicious": 1}),
        ("median", {}),
        ("trimmed", {"beta": 0.2}),
        ("bulyan", {"malicious": 1}),
        ("geomedian", {}),
        ("normclip", {"bound": 1.0}),
        ("fedavg", {}),
    ],
)
@given(strength=st.floats(4.0, 100.0), seed=st.integers(0, 999), tens=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_fifth_that_flips_its_sign_turns_the_mean_but_no_robust_rule(
    name: str, options: dict[str, Any], strength: float, seed: int, tens: bool
) -> None:
    """Clients learn one thing with some noise; 1 of 5 or 2 of 10 send its opposite, four times as large or more."""
    clients, liars = (10, 2) if tens or name == "bulyan" else (5, 1)
    if "malicious" in options:
        options = {"malicious": 1 if name == "bulyan" else liars}
    draw = torch.Generator().manual_seed(seed)
    spec = Spec({"x": LeafSpec((40,), torch.float64)}, algebra="affine", max_abs=1e6)
    start, learned = (torch.randn(40, generator=draw).double() for _ in range(2))
    learned = 0.8 * learned / learned.norm()
    honest, updates = [], []
    for k in range(clients):
        noise = torch.randn(40, generator=draw).double()
        change = learned + 0.3 * noise / noise.norm()
        if k < liars:
            change = -strength * change
        else:
            honest.append(change)
        updates.append(Update(f"c{k}", 0, 10.0, {"x": start + change}))
    rule = create_rule(name, **options)
    state = rule.init(spec, current={"x": start})
    for update in updates:
        rule.add(state, update)
    got = rule.finish(state)["x"] - start
    wanted = sum(honest) / len(honest)
    along = float(got @ wanted / wanted.square().sum())
    if name == "fedavg":
        assert along < 0.2
    else:
        assert along > (0.5 if name == "normclip" else 0.7)
        assert along < 1.3
