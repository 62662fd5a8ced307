"""Validation of updates: each kind of bad input is refused with its own word."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fednano.aggregation import LeafSpec, Product, Refusal, Spec, create_rule, validate
from fednano.errors import ConfigError, UpdateRefused


def check(update, spec, **options) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(UpdateRefused) as refused:
        validate(update, spec, round=3, **options)
    assert isinstance(refused.value, Refusal)
    assert update.client in str(refused.value)
    return refused.value.reason


def test_good_updates_pass(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        spec = make_spec(dtype=dtype)
        for update in make_updates(spec, 3, fisher=True):
            validate(update, spec, round=3, needs_fisher=True)
    spec = make_spec(max_abs=1e200)
    (update,) = make_updates(spec, 1)
    update.leaves["image.A"][0, 0] = 1e199  # its square overflows; the value itself is within the bound
    validate(update, spec, round=3)


def test_each_fault_has_its_word(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec(max_abs=32.0)
    (u,) = make_updates(spec, 1)

    def leaf(name: str, value: torch.Tensor) -> object:
        return dataclasses.replace(u, leaves={**u.leaves, name: value})

    a = u.leaves["image.A"]
    assert check(dataclasses.replace(u, spec="other"), spec) == "spec"
    assert check(dataclasses.replace(u, basis="other"), spec) == "basis"
    assert check(dataclasses.replace(u, round=2), spec) == "round"
    for weight in (0.0, -2.0, math.nan, math.inf, 5000.0):
        assert check(dataclasses.replace(u, weight=weight), spec) == "weight"
    assert check(dataclasses.replace(u, leaves={"image.A": a}), spec) == "schema"
    assert check(leaf("extra", a), spec) == "schema"
    assert check(leaf("image.A", a.T.contiguous()), spec) == "schema"
    assert check(leaf("image.A", a.float()), spec) == "schema"
    assert check(leaf("image.A", a.reshape(-1)), spec) == "schema"
    for bad in (math.nan, math.inf, -math.inf):
        broken = a.clone()
        broken[3, 1] = bad
        assert check(leaf("image.A", broken), spec) == "nonfinite"
    assert check(leaf("image.A", a * 1e30), spec) == "norm"
    assert check(u, dataclasses.replace(spec, max_norm=1.0)) == "norm"
    assert check(u, spec, needs_fisher=True) == "fisher"
    for value in (-1e-9, math.nan, math.inf):
        fisher = {n: torch.full_like(t, value) for n, t in u.leaves.items()}
        assert check(dataclasses.replace(u, fisher=fisher), spec) == "fisher"
    assert check(dataclasses.replace(u, fisher={"image.A": a.abs()}), spec) == "fisher"
    assert (
        check(dataclasses.replace(u, fisher={n: t[:1].abs() for n, t in u.leaves.items()}), spec) == "fisher"
    )
    assert check(dataclasses.replace(u, scales={"image": 0.0}), spec) == "scale"
    assert check(dataclasses.replace(u, scales={"image": math.nan}), spec) == "scale"
    assert check(dataclasses.replace(u, scales={"nowhere": 1.0}), spec) == "scale"


def test_what_validate_leaves_to_the_accumulators_they_refuse(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    u, other = make_updates(spec, 2, fisher=True)
    bad = u.leaves["image.A"].clone()
    for rule_name in ("fedavg", "fisher"):
        rule = create_rule(rule_name)
        for value, reason in ((math.nan, "nonfinite"), (1e30, "norm")):
            bad[0, 0] = value
            broken = dataclasses.replace(u, leaves={**u.leaves, "image.A": bad})
            validate(broken, spec, round=3, values=False)
            assert check(broken, spec) == reason
            state = rule.add(rule.init(spec), other)
            with pytest.raises(Refusal) as refused:
                rule.add(state, broken)
            assert refused.value.reason == reason
    assert check(dataclasses.replace(u, fisher={"image.A": bad}), spec, values=False) == "fisher"


def test_ranks(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    small, spec = make_spec(rank=2), make_spec(rank=4)
    (u,) = make_updates(small, 1)
    assert check(u, spec) == "rank"
    flexible = dataclasses.replace(spec, rank_limit=8)
    validate(u, flexible, round=3)
    validate(u, flexible, round=3, ranks={"image": 2, "text": 2})
    assert check(u, flexible, ranks={"image": 4, "text": 2}) == "rank"
    assert check(u, dataclasses.replace(spec, rank_limit=1)) == "rank"
    mixed = dataclasses.replace(u, leaves={**u.leaves, "image.A": torch.zeros(12, 3, dtype=torch.float64)})
    assert check(mixed, flexible) == "rank"


def test_part_of_the_leaves(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    (u,) = make_updates(spec, 1)
    half = dataclasses.replace(u, leaves={n: t for n, t in u.leaves.items() if n.endswith(".B")})
    validate(half, spec, round=3, names=["image.B", "text.B"])
    assert check(half, spec) == "schema"
    assert check(u, spec, names=["image.B", "text.B"]) == "schema"


def test_specifications() -> None:
    leaf = {"a": LeafSpec((3, 2)), "b": LeafSpec((2, 5)), "c": LeafSpec((4,))}
    spec = Spec(leaf, products={"s": Product("a", "b", 0.5, down="right")})
    assert (spec.numel, spec.nbytes, spec.rank("s")) == (20, 80, 2)
    assert spec.rank_axes() == {"a": ("s", 1), "b": ("s", 0)}
    assert spec.restrict(["a", "c"]).products == {}
    assert (spec.products["s"].A, spec.products["s"].B) == ("b", "a")
    assert Product("x.A", "x.B").A == "x.A"  # a NanoAdapter: y = x A B
    assert Product("x.B", "x.A").A == "x.A"  # LoRA: delta = B A
    with pytest.raises(ConfigError, match="down="):
        _ = Product("x.u", "x.v").A
    bad: list[dict[str, object]] = [
        {"leaves": {}},
        {"leaves": {"a": LeafSpec((2,), torch.int64)}},
        {"leaves": leaf, "algebra": "linear"},
        {"leaves": leaf, "max_clients": 0},
        {"leaves": leaf, "max_abs": math.inf},
        {"leaves": leaf, "max_norm": 0.0},
        {"leaves": leaf, "rank_limit": 0},
        {"leaves": leaf, "products": {"s": Product("b", "a", down="left")}},
        {"leaves": leaf, "products": {"s": Product("a", "c", down="left")}},
    ]
    for options in bad:
        with pytest.raises(ConfigError):
            Spec(**options)  # type: ignore[arg-type]
    for product in ({"scale": 0.0}, {"scale": math.nan}, {"down": "up"}):
        with pytest.raises(ConfigError):
            Product("a", "b", **product)  # type: ignore[arg-type]
