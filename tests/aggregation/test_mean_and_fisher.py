"""FedAvg and diagonal Fisher merging against their closed forms in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fednano.aggregation import Aggregator, Leaves, Refusal, Rule, Spec, Update, create_rule, rule_names
from fednano.errors import ConfigError, RunError


def merge(rule: Rule, spec: Spec, updates: list[Update], **init: object) -> Leaves:
    state = rule.init(spec, round=3, **init)  # type: ignore[arg-type]
    for update in updates:
        state = rule.add(state, update)
    return rule.finish(state)


def closed_form_mean(updates: list[Update]) -> Leaves:
    total = math.fsum(u.weight for u in updates)
    return {n: sum(u.weight * u.leaves[n].double() for u in updates) / total for n in updates[0].leaves}  # type: ignore[misc]


def closed_form_fisher(updates: list[Update], normalise: str, floor: float, clip: float) -> Leaves:
    out = {}
    fishers = []
    for u in updates:
        assert u.fisher is not None
        whole = torch.cat([f.double().reshape(-1) for f in u.fisher.values()]).mean()
        means = {
            n: {"leaf": f.double().mean(), "all": whole, "none": torch.tensor(1.0)}[normalise]
            for n, f in u.fisher.items()
        }
        fishers.append({n: (f.double() / means[n]).clamp(floor, clip) for n, f in u.fisher.items()})
    for n in updates[0].leaves:
        top = sum(u.weight * f[n] * u.leaves[n].double() for u, f in zip(updates, fishers, strict=True))
        out[n] = top / sum(u.weight * f[n] for u, f in zip(updates, fishers, strict=True))
    return out  # type: ignore[return-value]


def close(got: Leaves, want: Leaves, tol: float) -> None:
    assert set(got) == set(want)
    for name in want:
        assert (got[name].double() - want[name]).abs().max() <= tol, name


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 5e-7)])
@pytest.mark.parametrize(
    "weights", [[1.0, 1.0, 1.0], [0.2, 0.3, 0.5], [1000.0, 3.5, 17.0], [0.001, 0.004, 0.002]]
)
def test_fedavg_is_the_weighted_mean(make_spec, make_updates, dtype, tol, weights) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(dtype=dtype, max_weight=max(weights))
    updates = make_updates(spec, 3, weights=weights)
    got = merge(create_rule("fedavg"), spec, updates)
    close(got, closed_form_mean(updates), tol)
    assert all(leaf.dtype == dtype for leaf in got.values())


@pytest.mark.parametrize("normalise", ["leaf", "all", "none"])
@pytest.mark.parametrize(("floor", "clip"), [(0.05, 32.0), (0.5, 1.5), (1e-3, 4.0)])
def test_fisher_is_its_closed_form(make_spec, make_updates, normalise, floor, clip) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    updates = make_updates(spec, 5, fisher=True)
    rule = create_rule("fisher", normalise=normalise, floor=floor, clip=clip)
    # the error bound of the fixed point at the smallest denominator a client can bring
    close(merge(rule, spec, updates), closed_form_fisher(updates, normalise, floor, clip), 1e-7)


def test_equal_fishers_are_fedavg(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    updates = make_updates(spec, 4, fisher=True)
    same = updates[0].fisher
    equal = [Update(**{**u.__dict__, "fisher": same}) for u in updates]
    close(merge(create_rule("fisher"), spec, equal), merge(create_rule("fedavg"), spec, equal), 1e-7)
    flat = create_rule("fisher", floor=1.0, clip=1.0)  # floor meets clip: whatever the Fishers, the same
    close(merge(flat, spec, updates), merge(create_rule("fedavg"), spec, updates), 1e-7)
    # and unequal ones are not, or this test would show nothing
    differ = merge(create_rule("fisher"), spec, updates)
    assert (differ["image.A"] - merge(create_rule("fedavg"), spec, updates)["image.A"]).abs().max() > 1e-2


def test_fisher_follows_the_client_that_knows(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    a, b = make_updates(spec, 2, weights=[5.0, 5.0])
    fa = {n: torch.full(s.shape, 1e-9, dtype=torch.float64) for n, s in spec.leaves.items()}
    fb = {n: torch.full(s.shape, 1e-9, dtype=torch.float64) for n, s in spec.leaves.items()}
    fa["image.A"] += 1.0
    fb["text.A"] += 1.0
    got = merge(
        create_rule("fisher", floor=1e-3),
        spec,
        [Update(**{**a.__dict__, "fisher": fa}), Update(**{**b.__dict__, "fisher": fb})],
    )
    for name, owner in (("image.A", a), ("text.A", b)):
        assert (got[name] - owner.leaves[name]).abs().max() < 0.01
    assert (got["image.B"] - (a.leaves["image.B"] + b.leaves["image.B"]) / 2).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("normalise", ["leaf", "all"])
def test_a_clients_loss_scale_does_not_matter(make_spec, make_updates, scale, normalise) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    updates = make_updates(spec, 3, fisher=True)
    first = updates[0]
    assert first.fisher is not None
    scaled = Update(**{**first.__dict__, "fisher": {n: f * scale for n, f in first.fisher.items()}})
    rule = create_rule("fisher", normalise=normalise)
    close(merge(rule, spec, [scaled, *updates[1:]]), merge(rule, spec, updates), 1e-9)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fisher"])
def test_any_order_gives_the_same_bits(make_spec, make_updates, name) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(dtype=torch.float32)
    updates = make_updates(spec, 5, fisher=True)
    results = [merge(create_rule(name), spec, list(order)) for order in itertools.permutations(updates)]
    for leaf in spec.leaves:
        assert len({r[leaf].numpy().tobytes() for r in results}) == 1


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fisher"])
def test_one_client_is_the_identity(make_spec, make_updates, name) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    (update,) = make_updates(spec, 1, fisher=True)
    close(merge(create_rule(name), spec, [update]), update.leaves, 1e-7)


def test_no_updates_and_bad_updates(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    rule = create_rule("fedavg")
    with pytest.raises(RunError, match="no update was accepted"):
        rule.finish(rule.init(spec))
    state = rule.init(spec)
    good, other = make_updates(spec, 2)
    rule.add(state, good)
    cases: list[tuple[dict[str, object], str]] = [
        ({"client": good.client}, "duplicate"),
        ({"weight": 0.0}, "weight"),
        ({"weight": -1.0}, "weight"),
        ({"weight": math.nan}, "weight"),
        ({"weight": math.inf}, "weight"),
        ({"weight": 1e-12}, "weight"),
        ({"leaves": {**other.leaves, "image.A": other.leaves["image.A"] * math.nan}}, "nonfinite"),
        ({"leaves": {**other.leaves, "text.B": other.leaves["text.B"] * 1e30}}, "norm"),
    ]
    for change, reason in cases:
        with pytest.raises(Refusal) as refused:
            rule.add(state, Update(**{**other.__dict__, **change}))  # type: ignore[arg-type]
        assert refused.value.reason == reason
    close(rule.finish(state), good.leaves, 1e-9)


@pytest.mark.parametrize(
    "fisher",
    [None, -1.0, 0.0, math.nan, math.inf],
)
def test_bad_fishers_are_refused(make_spec, make_updates, fisher) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    good, bad = make_updates(spec, 2, fisher=True)
    value = (
        None
        if fisher is None
        else {n: torch.full(s.shape, fisher, dtype=s.dtype) for n, s in spec.leaves.items()}
    )
    rule = create_rule("fisher")
    state = rule.add(rule.init(spec), good)
    with pytest.raises(Refusal) as refused:
        rule.add(state, Update(**{**bad.__dict__, "fisher": value}))
    assert refused.value.reason == "fisher"
    close(rule.finish(state), good.leaves, 1e-6)


def test_registry() -> None:
    assert {"fedavg", "fedprox", "fisher"} <= set(rule_names())
    for name in rule_names():
        rule = create_rule(name)
        assert rule.name == name
        assert isinstance(rule, Aggregator)
        assert rule.capability.summary
    with pytest.raises(ConfigError, match=r"There are: .*fedavg"):
        create_rule("fedavgg")
    with pytest.raises(ConfigError, match="Its options: mu"):
        create_rule("fedprox", nu=1.0)
    for bad in ({"floor": 0.0}, {"floor": 2.0, "clip": 1.0}, {"normalise": "x"}, {"clip": math.inf}):
        with pytest.raises(ConfigError):
            create_rule("fisher", **bad)
    with pytest.raises(ConfigError):
        create_rule("fedprox", mu=-1.0)
    assert create_rule("fedprox", mu=0.3).client_config() == {"proximal_mu": 0.3}
