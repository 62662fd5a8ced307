"""Rules that keep one factor fixed: what travels, and exactness of the mean of deltas."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fednano.aggregation import LeafSpec, Product, Spec, create_rule
from fednano.aggregation.factors import instance_mix
from fednano.errors import ConfigError


def lora_spec() -> Spec:
    leaves = {
        "q.A": LeafSpec((3, 10), torch.float64),
        "q.B": LeafSpec((7, 3), torch.float64),
        "bias": LeafSpec((7,), torch.float64),
    }
    return Spec(leaves, products={"q": Product("q.B", "q.A", 2.0)}, max_weight=1024.0)


def test_what_travels(make_spec) -> None:  # type: ignore[no-untyped-def]
    nano, lora = make_spec(), lora_spec()
    expected = {
        ("ffa", 1): (("image.B", "text.B"), ("q.B", "bias"), {"frozen": "A"}),
        ("rolora", 1): (("image.B", "text.B"), ("q.B", "bias"), {"frozen": "A"}),
        ("rolora", 2): (("image.A", "text.A"), ("q.A", "bias"), {"frozen": "B"}),
        ("fedsa", 1): (("image.A", "text.A"), ("q.A",), {"personal": "B"}),
    }
    for (name, number), (of_nano, of_lora, advice) in expected.items():
        rule = create_rule(name)
        assert rule.travelling(nano, number) == of_nano
        assert rule.travelling(lora, number) == of_lora
        assert rule.client_config(number) == advice
    assert create_rule("feddpa").travelling(nano) == tuple(nano.leaves)
    assert create_rule("feddpa", samples=3).client_config()["personal_adapter"] is True
    flat = Spec({"v": LeafSpec((4,))})
    for name in ("ffa", "rolora", "fedsa"):
        with pytest.raises(ConfigError, match="no products"):
            create_rule(name).travelling(flat)


@pytest.mark.parametrize(("name", "number"), [("ffa", 1), ("ffa", 2), ("rolora", 1), ("rolora", 2)])
def test_mean_of_deltas_is_exact(make_updates, name, number) -> None:  # type: ignore[no-untyped-def]
    spec = lora_spec()
    rule = create_rule(name)
    current = make_updates(spec, 1, seed=5)[0].leaves
    moving = rule.travelling(spec, number)
    updates = [
        dataclasses.replace(u, leaves={n: t for n, t in u.leaves.items() if n in moving})
        for u in make_updates(spec, 5)
    ]
    state = rule.init(spec, current=current, round=number)
    for u in updates:
        rule.add(state, u)
    got = rule.finish(state)
    total = sum(u.weight for u in updates)
    dense = sum(
        u.weight / total * 2.0 * {**current, **u.leaves}["q.B"] @ {**current, **u.leaves}["q.A"]
        for u in updates
    )
    assert torch.allclose(2.0 * got["q.B"] @ got["q.A"], dense, atol=1e-8)
    fixed = "q.A" if "q.A" not in moving else "q.B"
    assert torch.equal(got[fixed], current[fixed])


def test_ffa_is_exact_behind_a_gelu(make_spec, make_updates) -> None:  # type: ignore[no-untyped-def]
    spec = make_spec()
    rule = create_rule("ffa")
    current = make_updates(spec, 1, seed=5)[0].leaves
    updates = make_updates(spec, 4, weights=[1.0] * 4)
    state = rule.init(spec, current=current)
    for u in updates:
        rule.add(state, u)
    got = rule.finish(state)
    x = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.nn.functional.gelu(x @ current["image.A"])
    mean = torch.stack([hidden @ u.leaves["image.B"] for u in updates]).mean(0)
    assert torch.allclose(torch.nn.functional.gelu(x @ got["image.A"]) @ got["image.B"], mean, atol=1e-8)


def test_instance_mix() -> None:
    own = torch.eye(4)[:2]
    mix = instance_mix(torch.tensor([[1.0, 1.0, 0, 0], [0, 0, 1.0, 0], [-1.0, 0, 0, 0]]), own)
    assert torch.allclose(mix, torch.tensor([2**-0.5, 0.0, 0.0]), atol=1e-6)
    assert instance_mix(torch.ones(1, 4), own, strength=100.0).item() == 1.0
