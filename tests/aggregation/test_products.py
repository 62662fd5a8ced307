"""Rules that merge products, against dense algebra in float64 and against PEFT's adapter merging."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from typing import Any

import pytest
import torch

from fednano.aggregation import LeafSpec, Leaves, Product, Rule, Spec, Update, create_rule
from fednano.aggregation.lowrank import factor, inner, pad_rank, stack, truncated_svd
from fednano.errors import ConfigError

D_IN, D_OUT = 64, 48
RANKS = (4, 8, 16, 8, 4)
ALPHAS = (8.0, 8.0, 32.0, 4.0, 16.0)


def lora(rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Spec:
    leaves = {"q.A": LeafSpec((rank, D_IN), dtype), "q.B": LeafSpec((D_OUT, rank), dtype)}
    return Spec(leaves, products={"q": Product("q.B", "q.A", scale)}, max_weight=1024.0, rank_limit=64)


def nano(rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Spec:
    leaves = {"q.A": LeafSpec((D_IN, rank), dtype), "q.B": LeafSpec((rank, D_OUT), dtype)}
    return Spec(leaves, products={"q": Product("q.A", "q.B", scale)}, max_weight=1024.0, rank_limit=64)


def clients(
    make: Any, seed: int = 0, ranks: tuple[int, ...] = RANKS, dtype: torch.dtype = torch.float64
) -> list[Update]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for k, rank in enumerate(ranks):
        spec = make(rank)
        leaves = {
            n: torch.randn(s.shape, generator=g, dtype=torch.float64).to(dtype) / 4
            for n, s in spec.leaves.items()
        }
        out.append(Update(f"c{(k * 3) % 5}", 1, 3.0 + k, leaves, scales={"q": ALPHAS[k] / rank}))
    return out


def delta(spec: Spec, leaves: Leaves, scale: float | None = None) -> torch.Tensor:
    p = spec.products["q"]
    return (p.scale if scale is None else scale) * leaves[p.left].double() @ leaves[p.right].double()


def dense_mean(spec: Spec, updates: list[Update]) -> torch.Tensor:
    total = math.fsum(u.weight for u in updates)
    return sum(u.weight / total * delta(spec, u.leaves, u.scales["q"]) for u in updates)  # type: ignore[return-value]


def merge(rule: Rule, spec: Spec, updates: list[Update], **init: Any) -> tuple[Leaves, Leaves, Any]:
    state = rule.init(spec, round=1, **init)
    for u in updates:
        rule.add(state, u)
    return rule.finish(state), rule.memory(state), state


def beside(memory: Leaves) -> torch.Tensor:
    return memory["residual/q.left"].double() @ memory["residual/q.right"].double()


@pytest.mark.parametrize("make", [lora, nano])
@pytest.mark.parametrize("gauge", ["follow", "even"])
def test_exactness_table(make: Any, gauge: str) -> None:
    """5 clients, ranks 4, 8, 16, different alphas: product rules equal the dense average, naive averaging does not."""
    updates = clients(make)
    full = make(sum(RANKS), scale=0.5)  # a global rank that can hold the whole mean
    want = dense_mean(full, updates)
    current = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in full.leaves.items()}
    got, _, state = merge(create_rule("flexlora", gauge=gauge), full, updates, current=current)
    error = {"flexlora": (delta(full, got) - want).abs().max().item()}
    assert state.report["truncation/q"] < 1e-9
    server = make(16, scale=0.5)
    start = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in server.leaves.items()}
    got, memory, _ = merge(create_rule("fedex"), server, updates)
    error["fedex"] = (delta(server, got) + beside(memory) - want).abs().max().item()
    got, memory, _ = merge(create_rule("flora"), server, updates, current=start)
    assert delta(server, got).abs().max() == 0.0
    error["flora"] = beside(memory).sub(want).abs().max().item()
    naive = {}
    for name in ("hetlora", "nested"):
        got, _, _ = merge(create_rule(name), server, updates, current=start)
        naive[name] = (delta(server, got) - want).abs().max().item()
    same = clients(make, ranks=(8,) * 5)
    got, _, _ = merge(
        create_rule("fedavg"), make(8), [dataclasses.replace(u, scales={"q": 1.0}) for u in same]
    )
    naive["fedavg"] = (
        (delta(make(8), got) - dense_mean(full, [dataclasses.replace(u, scales={"q": 1.0}) for u in same]))
        .abs()
        .max()
        .item()
    )
    assert all(e < 1e-10 for e in error.values()), error
    assert all(e > 1e-2 for e in naive.values()), naive


@pytest.mark.parametrize("make", [lora, nano])
def test_truncation_is_the_best_approximation(make: Any) -> None:
    updates, spec = clients(make), make(8, scale=2.0)
    got, _, state = merge(create_rule("flexlora"), spec, updates)
    want = dense_mean(spec, updates)
    u, s, vt = torch.linalg.svd(want)
    best = u[:, :8] * s[:8] @ vt[:8]
    assert (delta(spec, got) - best).abs().max() < 1e-10
    assert state.report["truncation/q"] == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-9)


@pytest.mark.parametrize("name", ["flexlora", "fedex", "hetlora", "nested"])
@pytest.mark.parametrize("make", [lora, nano])
def test_clients_get_their_own_rank_and_scale(make: Any, name: str) -> None:
    spec = make(16, scale=0.5)
    updates = clients(make)
    start = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in spec.leaves.items()}
    rule = create_rule(name)
    got, _, _ = merge(rule, spec, updates, current=start)
    whole = rule.for_client(got, spec, scales={"q": 3.0})
    assert (delta(spec, whole, 3.0) - delta(spec, got)).abs().max() < 1e-10
    small = rule.for_client(got, spec, ranks={"q": 4}, scales={"q": 2.0})
    assert small[spec.products["q"].left].shape[1] == 4
    if name in ("flexlora", "fedex"):
        u, s, vt = torch.linalg.svd(delta(spec, got))
        assert (delta(spec, small, 2.0) - u[:, :4] * s[:4] @ vt[:4]).abs().max() < 1e-10
    for rank in (0, 17):
        with pytest.raises(ConfigError):
            rule.for_client(got, spec, ranks={"q": rank})
    assert rule.for_client(got, spec)["q.A"] is got["q.A"]


def test_rules_of_one_rank_say_so() -> None:
    spec = lora(4)
    got, _, _ = merge(create_rule("fedavg"), spec, clients(lora, ranks=(4, 4)))
    assert torch.allclose(
        delta(spec, create_rule("fedavg").for_client(got, spec, scales={"q": 4.0}), 4.0), delta(spec, got)
    )
    with pytest.raises(ConfigError, match="flexlora"):
        create_rule("fedavg").for_client(got, spec, ranks={"q": 2})


def test_residuals_accumulate_over_rounds() -> None:
    """With FedEx and FLoRA, adapter plus residual is the mean of what the clients had, round after round."""
    for name in ("fedex", "flora"):
        spec = nano(6, dtype=torch.float64)
        rule = create_rule(name)
        current = {n: torch.randn(s.shape, dtype=torch.float64) for n, s in spec.leaves.items()}
        memory: Leaves = {}
        for number in range(1, 4):
            updates = [
                dataclasses.replace(u, round=number, scales={"q": 1.0})
                for u in clients(nano, seed=number, ranks=(6, 6, 6))
            ]
            old = beside(memory) if memory else torch.zeros(D_IN, D_OUT, dtype=torch.float64)
            state = rule.init(spec, current=current, memory=memory, round=number)
            for u in updates:
                rule.add(state, u)
            current, memory = rule.finish(state), rule.memory(state)
            have = delta(spec, current) + beside(memory)
            assert (have - (old + dense_mean(spec, updates))).abs().max() < 1e-10
            assert set(rule.downlink(memory)) == {"residual/q.left", "residual/q.right"}
        if name == "flora":
            assert current["q.A"].std() > 0.1


def test_residual_cap_is_reported() -> None:
    spec, updates = lora(8), clients(lora, ranks=(8, 8, 8))
    got, memory, state = merge(create_rule("fedex", residual_rank=5), spec, updates)
    assert memory["residual/q.left"].shape == (D_OUT, 5)
    missing = delta(spec, got) + beside(memory) - dense_mean(spec, updates)
    rest = dense_mean(spec, updates) - delta(spec, got)
    assert missing.norm() / rest.norm() == pytest.approx(state.report["truncation/q"], rel=1e-6)
    assert 0.0 < state.report["truncation/q"] < 1.0


@pytest.mark.parametrize("name", ["flexlora", "fedex", "flora", "hetlora", "nested"])
def test_any_order_gives_the_same_bits(name: str) -> None:
    spec, updates = nano(16, dtype=torch.float32), clients(nano, dtype=torch.float32)
    start = {n: torch.ones(s.shape) for n, s in spec.leaves.items()}
    seen = set()
    for order in list(itertools.permutations(updates))[::17]:
        got, memory, _ = merge(create_rule(name), spec, list(order), current=start)
        seen.add(b"".join(t.numpy().tobytes() for t in (*got.values(), *memory.values())))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["flexlora", "hlora", "fedex", "hetlora", "nested"])
@pytest.mark.parametrize("make", [lora, nano])
def test_one_client_is_the_identity(name: str, make: Any) -> None:
    spec = make(8, scale=0.25)
    (u,) = clients(make, ranks=(8,))
    got, memory, _ = merge(create_rule(name), spec, [u])
    have = delta(spec, got) + (beside(memory) if memory else 0.0)
    assert (have - delta(spec, u.leaves, u.scales["q"])).abs().max() < 1e-7
    if name == "flexlora":  # the factors, too: the split follows the client's own down factor
        assert (got["q.A"] - u.leaves["q.A"]).abs().max() < 1e-9


def test_split_follows_the_down_factor_when_the_delta_is_zero() -> None:
    """A LoRA at its start (B = 0) keeps its A: a balanced split of a zero delta would kill it."""
    spec = lora(8)
    (u,) = clients(lora, ranks=(8,))
    u = dataclasses.replace(u, leaves={"q.A": u.leaves["q.A"], "q.B": torch.zeros_like(u.leaves["q.B"])})
    got, _, _ = merge(create_rule("flexlora"), spec, [u])
    assert (got["q.A"] - u.leaves["q.A"]).abs().max() < 1e-12
    assert got["q.B"].abs().max() == 0.0


def test_hetlora_weights_and_nested_counts() -> None:
    spec, updates = lora(16, scale=0.5), clients(lora)
    start = {n: torch.full(s.shape, 7.0, dtype=torch.float64) for n, s in spec.leaves.items()}
    got, _, _ = merge(create_rule("hetlora"), spec, updates)
    norms = [float(delta(spec, u.leaves, u.scales["q"]).norm()) for u in updates]
    want_b = sum(
        n * pad_rank(u.leaves["q.B"], u.leaves["q.A"], 16)[0] * u.scales["q"] / 0.5
        for n, u in zip(norms, updates, strict=True)
    ) / sum(norms)
    assert (got["q.B"] - want_b).abs().max() < 1e-7
    small = [u for u in updates if u.leaves["q.A"].shape[0] <= 8]
    got, _, _ = merge(create_rule("nested"), spec, small, current=start)
    for j in range(16):
        have = [u for u in small if u.leaves["q.A"].shape[0] > j]
        if not have:
            assert torch.equal(got["q.A"][j], start["q.A"][j])
            continue
        row = sum(u.weight * u.leaves["q.A"][j] for u in have) / sum(u.weight for u in have)
        assert (got["q.A"][j] - row).abs().max() < 1e-8


def test_a_refused_update_leaves_no_trace_in_sliced_sums() -> None:
    spec = lora(16)
    good, bad = clients(lora)[:2]
    rule = create_rule("nested")
    state = rule.add(rule.init(spec), good)
    before = state.sums["q"].integers()
    poisoned = dataclasses.replace(bad, leaves={**bad.leaves, "q.A": bad.leaves["q.A"] * math.nan})
    with pytest.raises(Exception, match="NaN"):
        rule.add(state, poisoned)
    after = state.sums["q"].integers()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert state.sums["q"].count == 1


@pytest.mark.parametrize("q", [40, 700])
def test_large_cores_take_the_gram_route_and_agree(q: int) -> None:
    g = torch.Generator().manual_seed(q)
    left, right = (
        torch.randn(900, q, generator=g, dtype=torch.float64),
        torch.randn(q, 800, generator=g, dtype=torch.float64),
    )
    u, s, vt = truncated_svd(left, right, 6)
    want = torch.linalg.svdvals(left @ right)[:6]
    assert torch.allclose(s, want, rtol=1e-9)
    projected = (left @ right) @ vt.T
    assert torch.allclose(u * s, projected, atol=1e-8 * float(s[0]))
    assert torch.allclose(u.T @ u, torch.eye(6, dtype=torch.float64), atol=1e-9)


def test_inner_stack_and_factor() -> None:
    g = torch.Generator().manual_seed(0)
    terms = [(0.3, torch.randn(9, r, generator=g), torch.randn(r, 7, generator=g)) for r in (2, 3)]
    left, right = stack(terms)
    dense = sum(c * l.double() @ r.double() for c, l, r in terms)  # noqa: E741
    assert torch.allclose(left @ right, dense)
    a, b = (terms[0][1], terms[0][2]), (terms[1][1], terms[1][2])
    assert inner(a, b) == pytest.approx(float(((a[0] @ a[1]) * (b[0] @ b[1])).sum()), rel=1e-5)
    svd = truncated_svd(left, right, 5)
    far = torch.zeros(5, 7, dtype=torch.float64)  # nothing to follow: falls back to the even split
    for follow in (None, far, torch.randn(5, 7, generator=g), torch.randn(4, 7, generator=g)):
        one, two = factor(*svd, 5, follow)
        assert torch.allclose(one @ two, dense, atol=1e-10)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_against_peft(combination: str) -> None:
    """PEFT merges three LoRAs of different rank and alpha; the deltas agree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(D_IN, D_OUT, bias=False))
        names, ranks, alphas = ["a", "b", "c"], (4, 8, 16), (8.0, 8.0, 32.0)
        configs = [
            peft.LoraConfig(r=r, lora_alpha=a, target_modules=["0"])
            for r, a in zip(ranks, alphas, strict=True)
        ]
        model = peft.get_peft_model(base, configs[0], adapter_name="a")
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        layer = model.base_model.model[0]
        updates = []
        for k, (name, r, alpha) in enumerate(zip(names, ranks, alphas, strict=True)):
            torch.nn.init.normal_(layer.lora_B[name].weight)
            leaves = {
                "q.A": layer.lora_A[name].weight.detach().clone(),
                "q.B": layer.lora_B[name].weight.detach().clone(),
            }
            updates.append(Update(name, 1, 1.0 + k, leaves, scales={"q": alpha / r}))
        weights = [u.weight / 6.0 for u in updates]
        options = {"svd_rank": 5} if combination == "svd" else {}
        model.add_weighted_adapter(names, weights, "merged", combination_type=combination, **options)
        want = layer.get_delta_weight("merged").detach().double()
    if combination == "cat":  # FLoRA's stacking
        spec = lora(16, dtype=torch.float32)
        start = {n: torch.randn(s.shape) for n, s in spec.leaves.items()}
        _, memory, _ = merge(create_rule("flora"), spec, updates, current=start)
        got = beside(memory)
    else:
        spec = lora(5, dtype=torch.float32)
        got = delta(spec, merge(create_rule("flexlora"), spec, updates)[0])
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_bad_options_and_adapters() -> None:
    flat = Spec({"v": LeafSpec((4,))})
    for name in ("flexlora", "fedex", "flora", "hetlora", "nested"):
        with pytest.raises(ConfigError, match="form none"):
            create_rule(name).init(flat)
    for name, options in (
        ("flexlora", {"gauge": "x"}),
        ("fedex", {"residual_rank": -1}),
        ("flora", {"residual_rank": -1}),
    ):
        with pytest.raises(ConfigError):
            create_rule(name, **options)
    with pytest.raises(ConfigError):
        create_rule("hetlora", floor=0.0)
