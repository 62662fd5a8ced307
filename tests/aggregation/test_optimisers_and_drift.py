"""Server optimisers and q-FedAvg against Flower's own strategies, SCAFFOLD against the paper's client-side formulas."""

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

from fednano.aggregation import Leaves, Refusal, Rule, Spec, Update, create_rule
from fednano.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp import strategy as flower


def rounds(
    rule: Rule, spec: Spec, start: Leaves, batches: list[list[Update]], first: int = 1
) -> tuple[list[Leaves], Leaves]:
    """Run several rounds; memory is passed through as a checkpoint would."""
    current, memory, out = start, {}, []
    for number, updates in enumerate(batches, start=first):
        state = rule.init(spec, current=current, memory=memory, round=number)
        for update in updates:
            rule.add(state, dataclasses.replace(update, round=number))
        current = rule.finish(state)
        memory = {k: v.clone() for k, v in rule.memory(state).items()}
        out.append(current)
    return out, memory


def flower_rounds(
    strategy: Any, start: Leaves, batches: list[list[Update]], first_round: int
) -> list[Leaves]:
    """The same rounds by a Flower strategy, without a grid."""
    names = list(start)
    strategy._check_and_log_replies = lambda replies, is_train, validate=True: (list(replies), [])
    current = ArrayRecord({n: Array(start[n].numpy()) for n in names})
    out = []
    for number, updates in enumerate(batches, start=first_round):
        if isinstance(strategy, flower.FedAvgM):
            strategy.current_arrays = ArrayRecord({n: Array(current[n].numpy()) for n in names})
        elif isinstance(strategy, flower.QFedAvg):
            strategy.current_arrays = current.copy()
        else:
            strategy.current_arrays = {n: current[n].numpy() for n in names}
        replies = []
        for u in updates:
            content = RecordDict(
                {
                    "arrays": ArrayRecord({n: Array(u.leaves[n].numpy()) for n in names}),
                    "metrics": MetricRecord({"num-examples": u.weight, "train_loss": u.metrics["loss"]}),
                }
            )
            replies.append(SimpleNamespace(content=content))  # all that a strategy reads of a message
        arrays, _ = strategy.aggregate_train(number, replies)
        current = arrays
        out.append({n: torch.from_numpy(np.array(arrays[n].numpy())) for n in names})
    return out


@pytest.mark.parametrize(
    ("name", "options", "strategy", "first_round"),
    [
        ("fedavg", {}, flower.FedAvg, 1),
        (
            "fedavgm",
            {"server_lr": 0.7, "beta": 0.8},
            lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.8),
            1,
        ),
        # Flower corrects round t with the exponent t + 1; starting it at round 0 gives Adam's own exponent.
        ("fedadam", {"server_lr": 0.05}, lambda: flower.FedAdam(eta=0.05), 0),
        ("fedyogi", {"server_lr": 0.05, "tau": 1e-2}, lambda: flower.FedYogi(eta=0.05, tau=1e-2), 1),
        ("fedadagrad", {"server_lr": 0.05}, lambda: flower.FedAdagrad(eta=0.05), 1),
        ("qfedavg", {"q": 0.7, "lr": 0.2}, lambda: flower.QFedAvg(client_learning_rate=0.2, q=0.7), 1),
        ("qfedavg", {"q": 0.0, "lr": 0.2}, lambda: flower.QFedAvg(client_learning_rate=0.2, q=0.0), 1),
    ],
)
def test_against_flower(
    monkeypatch, make_spec, make_updates, *, name, options, strategy, first_round
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # Flower collects after every record: seconds of nothing
    spec = make_spec()
    start = make_updates(spec, 1, seed=99)[0].leaves
    batches = [make_updates(spec, 4, seed=s) for s in range(4)]
    mine, _ = rounds(create_rule(name, **options), spec, start, batches)
    theirs = flower_rounds(strategy(), start, batches, first_round)
    for a, b in zip(mine, theirs, strict=True):
        for leaf in spec.leaves:
            assert torch.allclose(a[leaf], b[leaf], rtol=0, atol=2e-8), (name, leaf)


@pytest.mark.parametrize(
    "name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedexp", "scaffold", "qfedavg"]
)
def test_any_order_gives_the_same_bits_over_rounds(make_spec, make_updates, name) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(d=6, rank=2, dtype=torch.float32)
    start = make_updates(spec, 1, seed=99)[0].leaves
    results = []
    for order in itertools.permutations(range(4)):
        batches = [[make_updates(spec, 4, seed=s)[i] for i in order] for s in range(2)]
        leaves, memory = rounds(create_rule(name), spec, start, batches)
        results.append(b"".join(leaves[-1][n].numpy().tobytes() for n in spec.leaves))
        results[-1] += b"".join(memory[k].numpy().tobytes() for k in sorted(memory))
    assert len(set(results)) == 1


def test_plain_settings_are_fedavg(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    start = make_updates(spec, 1, seed=99)[0].leaves
    batches = [make_updates(spec, 3, seed=1)]
    plain, _ = rounds(create_rule("fedavg"), spec, start, batches)
    for name, options in (("fedavgm", {"server_lr": 1.0, "beta": 0.0}), ("scaffold", {})):
        got, _ = rounds(create_rule(name, **options), spec, start, batches)
        for leaf in spec.leaves:
            assert torch.allclose(got[0][leaf], plain[0][leaf], atol=1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_fedexp_follows_its_formula_in_float64(make_spec, make_updates, spread) -> None:  # type: ignore[no-untyped-def]
    """Against dense algebra, at clients that agree (the step is the mean's) and clients that do not."""
    spec = make_spec()
    start, common = (make_updates(spec, 1, seed=s)[0].leaves for s in (99, 98))
    updates = [
        dataclasses.replace(
            u, leaves={n: start[n] + 0.1 * (common[n] + spread * leaf) for n, leaf in u.leaves.items()}
        )
        for u in make_updates(spec, 6, seed=1)
    ]
    rule = create_rule("fedexp", server_lr=0.9, decay=0.5, eps=0.02)
    memory: Leaves = {}
    for number in range(2):
        state = rule.init(spec, current=start, memory=memory)
        for u in updates:
            rule.add(state, u)
        got = rule.finish(state)
        memory = rule.memory(state)
        flat = torch.stack([torch.cat([(u.leaves[n] - start[n]).flatten() for n in start]) for u in updates])
        share = torch.tensor([u.weight for u in updates], dtype=torch.float64)
        share = share / share.sum()
        mean = share @ flat
        step = max(1.0, float(share @ flat.square().sum(1)) / (2 * (float(mean @ mean) + 0.02)))
        assert (step > 1.0) == (spread > 1.0)
        assert state.report["server_step"] == pytest.approx(step, rel=1e-9)
        want = torch.cat([start[n].flatten() for n in start]) + 0.9 * 0.5**number * step * mean
        assert torch.allclose(torch.cat([got[n].flatten() for n in start]), want, rtol=0, atol=1e-8)
        assert set(memory) == {"step"}


def test_fedexp_over_another_rule_measures_what_travels(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    start = make_updates(spec, 1, seed=99)[0].leaves
    updates = [
        dataclasses.replace(u, leaves={n: start[n] + u.leaves[n] for n in ("image.B", "text.B")})
        for u in make_updates(spec, 8, seed=1)
    ]
    (got,), _ = rounds(create_rule("fedexp", over="ffa"), spec, start, [updates])
    (plain,), _ = rounds(create_rule("ffa"), spec, start, [updates])
    assert torch.equal(got["image.A"], start["image.A"])
    moves = [(got[n] - start[n]) / (plain[n] - start[n]) for n in ("image.B", "text.B")]
    step = float(moves[0].mean())
    assert step > 1.0
    assert all(torch.allclose(m, torch.full_like(m, step)) for m in moves)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_a_server_learning_rate_goes_beyond_the_mean(make_spec, make_updates, name) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    start = make_updates(spec, 1, seed=99)[0].leaves
    batches = [make_updates(spec, 3, seed=1)]
    (plain,), _ = rounds(create_rule(name), spec, start, batches)
    (beyond,), _ = rounds(create_rule(name, server_lr=1.5), spec, start, batches)
    (momentum,), _ = rounds(create_rule("fedavgm", server_lr=1.5, beta=0.0), spec, start, batches)
    for leaf in spec.leaves:
        assert torch.allclose(beyond[leaf], start[leaf] + 1.5 * (plain[leaf] - start[leaf]), atol=1e-9)
        assert torch.allclose(beyond[leaf], momentum[leaf], atol=1e-9)
    with pytest.raises(ConfigError, match="current"):
        create_rule(name, server_lr=1.5).init(spec)


def test_optimiser_over_another_rule(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    start = make_updates(spec, 1, seed=99)[0].leaves
    updates = make_updates(spec, 3, seed=1, fisher=True)
    fisher, _ = rounds(create_rule("fisher"), spec, start, [updates])
    got, memory = rounds(
        create_rule("fedavgm", server_lr=0.5, beta=0.9, over="fisher"), spec, start, [updates]
    )
    for leaf in spec.leaves:
        assert torch.allclose(got[0][leaf], start[leaf] + 0.5 * (fisher[0][leaf] - start[leaf]), atol=1e-9)
    assert set(memory) == {"step", *(f"m/{n}" for n in spec.leaves)}
    rule = create_rule("fedadam", over="ffa")
    assert rule.travelling(spec) == ("image.B", "text.B")
    assert rule.client_config(1) == {"frozen": "A"}
    halved, _ = rounds(create_rule("fedavgm", beta=0.0, decay=0.5), spec, start, [updates, updates])
    plain, _ = rounds(create_rule("fedavg"), spec, start, [updates])
    mid = halved[0]["image.A"] + 0.5 * (plain[0]["image.A"] - halved[0]["image.A"])
    assert torch.allclose(halved[1]["image.A"], mid, atol=1e-9)


def test_scaffold_follows_the_papers_client_formulas(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    """Clients that keep and send their variates give the same server variate as the two numbers they send here."""
    spec = make_spec()
    rule = create_rule("scaffold", clients=6, server_lr=0.8)
    current = make_updates(spec, 1, seed=99)[0].leaves
    c = {n: torch.zeros(s.shape, dtype=torch.float64) for n, s in spec.leaves.items()}
    own: dict[str, Leaves] = {}
    memory: Leaves = {}
    for number in range(1, 4):
        updates = [
            dataclasses.replace(u, client=f"k{i}", metrics={"steps": 5.0 + i, "lr": 0.1 / (1 + i)})
            for i, u in enumerate(make_updates(spec, 4, seed=number))
        ]
        state = rule.init(spec, current=current, memory=memory, round=number)
        total = {n: torch.zeros_like(v) for n, v in c.items()}
        for u in updates:
            rule.add(state, u)
            mine = own.get(u.client, {n: torch.zeros_like(v) for n, v in c.items()})
            k_eta = u.metrics["steps"] * u.metrics["lr"]
            fresh = {n: mine[n] - c[n] + (current[n] - u.leaves[n]) / k_eta for n in c}
            for n in c:
                total[n] += fresh[n] - mine[n]
            own[u.client] = fresh
        c = {n: c[n] + total[n] / 6 for n in c}
        weights = sum(u.weight for u in updates)
        mean = {n: sum(u.weight * u.leaves[n] for u in updates) / weights for n in c}
        want = {n: current[n] + 0.8 * (mean[n] - current[n]) for n in c}
        current = rule.finish(state)
        memory = rule.memory(state)
        for n in c:
            assert torch.allclose(memory[f"c/{n}"], c[n], atol=1e-6)
            assert torch.allclose(current[n], want[n], atol=1e-8)
    down = rule.downlink(memory)
    assert set(down) == {f"control/{n}" for n in spec.leaves}
    assert rule.client_config(1) == {"control_variates": True, "optimiser": "sgd"}


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("scaffold", {}),
        ("scaffold", {"steps": 0.0, "lr": 0.1}),
        ("scaffold", {"steps": 5.0, "lr": math.nan}),
        ("scaffold", {"steps": 5.0, "lr": 0.0}),
        ("qfedavg", {}),
        ("qfedavg", {"loss": -1.0}),
        ("qfedavg", {"loss": math.inf}),
        ("qfedavg", {"loss": 1e9}),
    ],
)
def test_missing_or_bad_metrics(make_spec, make_updates, name, metrics) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    a, b = make_updates(spec, 2)
    rule = create_rule(name)
    state = rule.init(spec, current=a.leaves)
    rule.add(state, b)
    with pytest.raises(Refusal) as refused:
        rule.add(state, dataclasses.replace(a, metrics=metrics))
    assert refused.value.reason == "metric"
    assert len(state.clients) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedadam", {"server_lr": 0.0}),
        ("fedadam", {"beta1": 1.0}),
        ("fedadam", {"tau": 0.0}),
        ("fedavgm", {"decay": 0.0}),
        ("fedavgm", {"beta": -0.1}),
        ("fedavg", {"server_lr": 0.0}),
        ("fedprox", {"server_lr": math.inf}),
        ("fedexp", {"eps": 0.0}),
        ("fedyogi", {"over": "fedadam"}),
        ("fedyogi", {"over": "nothing"}),
        ("scaffold", {"clients": -1}),
        ("qfedavg", {"lr": 0.0}),
        ("feddpa", {"samples": 0}),
    ],
)
def test_bad_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        create_rule(name, **options)


@pytest.mark.parametrize("name", ["fedavgm", "scaffold", "qfedavg", "ffa"])
def test_rules_on_changes_need_the_current_leaves(make_spec, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="current"):
        create_rule(name).init(make_spec())
