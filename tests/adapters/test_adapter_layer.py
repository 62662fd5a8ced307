"""The generic layer: contracts that hold whatever adapter it carries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fednano.adapters import AdapterLayer, Site, create, names, options
from fednano.errors import ConfigError, ModelError, UpdateRefused

BRIDGE = Site("bridge.image", "bridge", 6, 6)


def bridge(**options: object) -> AdapterLayer:
    return AdapterLayer(create("nano", rank=2, **options), BRIDGE, seed=0)


def perturb(layer: AdapterLayer, scale: float = 0.3) -> AdapterLayer:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.theta.values():
            value.add_(scale * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return layer


def test_nano_formula() -> None:
    for act in ("linear", "gelu"):
        layer = perturb(bridge(act=act, scale=0.5)).double()
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        z = x @ layer.theta["A"]
        if act == "gelu":
            z = z * 0.5 * (1 + torch.erf(z / 2**0.5))
        torch.testing.assert_close(layer(x), x + 0.5 * z @ layer.theta["B"])


def test_same_seed_same_bits_and_sites_differ() -> None:
    a, b = bridge(), bridge()
    assert all(torch.equal(a.theta[name], b.theta[name]) for name in a.theta)
    other = AdapterLayer(create("nano", rank=2), Site("bridge.text", "bridge", 6, 6), seed=0)
    assert not torch.equal(a.theta["A"], other.theta["A"])
    assert a.fingerprint() != other.fingerprint()


def test_functional_is_pure_and_vmaps() -> None:
    layer = perturb(bridge())
    theta = {name: value.detach() for name, value in layer.theta.items()}
    x = torch.randn(5, 3, 6)
    torch.testing.assert_close(layer.functional(theta, x), layer(x))

    def loss(theta: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return layer.functional(theta, row).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(theta, x)
    layer(x).square().sum().backward()
    for name, value in layer.theta.items():
        torch.testing.assert_close(rows[name].sum(0), value.grad)


def test_only_leaves_take_gradients_and_the_base_stays() -> None:
    base = nn.Linear(6, 4)
    layer = AdapterLayer(create("nano", rank=2), Site.of("fc", base), seed=0, base=base)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"theta.A", "theta.B"}
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), base(x))
    assert layer.release() is base
    assert base.weight.requires_grad
    assert base.bias.requires_grad


def test_weight_without_module() -> None:
    weight = torch.randn(4, 6)
    layer = perturb(AdapterLayer(create("nano", rank=2), Site("w", "linear", 6, 4), seed=0, weight=weight))
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), x @ (weight + layer.delta()).T)
    alone = AdapterLayer(create("nano", rank=2), Site("w", "linear", 6, 4), seed=0)
    assert torch.equal(alone(x), torch.zeros(3, 4))
    with pytest.raises(ModelError, match="no base weight to merge into"):
        alone.merge()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_bases(dtype: torch.dtype) -> None:
    base = nn.Linear(6, 4).to(dtype)
    layer = perturb(AdapterLayer(create("nano", rank=2), Site.of("fc", base), seed=0, base=base))
    out = layer(torch.randn(2, 6).to(dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert layer.theta["A"].grad.dtype == torch.float32
    layer.merge()
    assert base.weight.dtype == dtype
    layer.unmerge()


def test_non_contiguous_and_empty_inputs() -> None:
    layer = perturb(bridge())
    x = torch.randn(6, 5, 3).transpose(0, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    empty = layer(torch.zeros(0, 7, 6))
    assert empty.shape == (0, 7, 6)
    empty.sum().backward()
    assert all(float(value.grad.abs().sum()) == 0 for value in layer.theta.values())


def test_merged_bridge_and_double_merge() -> None:
    layer = perturb(bridge())
    x = torch.randn(3, 6)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before)
    with pytest.raises(ModelError, match="already merged"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer(x), before)
    with pytest.raises(ModelError, match="not merged"):
        layer.unmerge()


def test_gelu_says_why_it_cannot_merge() -> None:
    with pytest.raises(ModelError, match=r"act='gelu' .*'bridge.image' is not one matrix"):
        bridge(act="gelu").merge()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["lora", "lora-xs", "shira", "dense"]),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_any_convolution_is_changed_by_its_delta(
    name: str,
    channels: tuple[int, int],
    groups: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    conv = nn.Conv2d(
        channels[0] * groups,
        channels[1] * groups,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        dtype=torch.float64,
    )
    options = {} if name == "dense" else {"rank": 1}
    layer = AdapterLayer(create(name, **options), Site.of("c", conv), seed=0, base=conv)
    perturb(layer).double()
    x = torch.randn(2, channels[0] * groups, 6, 7, dtype=torch.float64)
    kernels = conv.weight + layer.delta().view_as(conv.weight)
    expected = nn.functional.conv2d(x, kernels, conv.bias, stride, padding, dilation, groups)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["lora", "nano", "svfit", "loca", "randlora", "nola"]),
    sizes=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    batch=st.lists(st.integers(0, 3), max_size=3),
)
def test_any_linear_shape_is_changed_by_its_delta(
    name: str, sizes: tuple[int, int], batch: list[int]
) -> None:
    options: dict[str, object] = {"count": 3} if name == "loca" else {"rank": 2}
    if name == "nola":
        options |= {"coefficients_a": 3, "coefficients_b": 5}
    weight = torch.randn(sizes[1], sizes[0])
    layer = AdapterLayer(create(name, **options), Site("w", "linear", *sizes), seed=0, weight=weight)
    perturb(layer).double()
    x = torch.randn(*batch, sizes[0], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (weight.double() + layer.delta()).T, rtol=1e-9, atol=1e-10)


# -- bad input -----------------------------------------------------------------------------------------------


def test_unknown_names_and_options_list_what_exists() -> None:
    with pytest.raises(ConfigError, match=r"unknown adapter 'nanno'. Did you mean 'nano'.*Adapters: .*nano"):
        create("nanno")
    with pytest.raises(ConfigError, match=r"no option 'rnak'. Did you mean 'rank'.*Its options: .*scale"):
        create("nano", rnak=3)
    with pytest.raises(ConfigError, match=r"option 'rank': got '8' \(str\); expected int"):
        create("nano", rank="8")
    with pytest.raises(ConfigError, match=r"option 'act': got 'relu'.*expected 'linear' \| 'gelu'"):
        create("nano", act="relu")
    assert "nano" in names()
    assert options("nano")["rank"] == 8


def test_rank_out_of_range() -> None:
    with pytest.raises(ConfigError, match="got rank=0; expected >= 1"):
        create("nano", rank=0)
    with pytest.raises(ConfigError, match=r"got rank=7 at site 'bridge.image'; expected rank <= .* = 6"):
        AdapterLayer(create("nano", rank=7), BRIDGE, seed=0)


def test_unsupported_site_names_adapter_site_and_a_way_out() -> None:
    site = Site.of("stem", nn.Conv2d(3, 4, 3))
    with pytest.raises(
        ModelError, match=r"'nano' cannot sit on conv2d site 'stem'; it supports bridge, linear"
    ):
        AdapterLayer(create("nano", rank=2), site, seed=0)
    with pytest.raises(ModelError, match="site 'norm' is a LayerNorm; adapters sit on"):
        Site.of("norm", nn.LayerNorm(3))
    with pytest.raises(ModelError, match="padding_mode='reflect'"):
        Site.of("c", nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ModelError, match="d_in=3, d_out=4; a bridge adds to its input"):
        Site("b", "bridge", 3, 4)


def test_wrong_input_shape() -> None:
    with pytest.raises(ModelError, match=r"got input of shape \(2, 5\); expected \(..., 6\)"):
        bridge()(torch.zeros(2, 5))


def test_leaves_of_another_rank_or_not_finite() -> None:
    layer = bridge()
    good = layer.travelling()
    with pytest.raises(
        ModelError,
        match=r"leaf 'A': got shape \(6, 3\), torch.float32; expected \(6, 2\).*another model or rank",
    ):
        layer.load_travelling({**good, "A": torch.zeros(6, 3)})
    with pytest.raises(ModelError, match=r"got leaves \['A'\]; expected \['A', 'B'\]"):
        layer.load_travelling({"A": good["A"]})
    for bad in (float("nan"), float("inf")):
        broken = good["B"].clone()
        broken[0, 0] = bad
        with pytest.raises(ModelError, match="leaf 'B': 1 of 12 numbers are NaN or Inf"):
            layer.load_travelling({**good, "B": broken})
    assert all(torch.equal(layer.theta[name], good[name]) for name in good)


def test_mismatched_fingerprint_names_both() -> None:
    layer, other = bridge(), bridge(scale=2.0)
    layer.require_fingerprint(layer.fingerprint())
    with pytest.raises(UpdateRefused) as error:
        layer.require_fingerprint(other.fingerprint())
    assert layer.fingerprint() in str(error.value)
    assert other.fingerprint() in str(error.value)


def test_sharded_quantised_and_meta_weights() -> None:
    adapter, site = create("nano", rank=2), Site("fc", "linear", 6, 4)
    sharded = nn.Linear(6, 4)
    sharded.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ModelError, match=r"site 'fc': its weight is sharded.*gather the full weight"):
        AdapterLayer(adapter, site, seed=0, base=sharded)
    with pytest.raises(ModelError, match="its weight is on the meta device"):
        AdapterLayer(adapter, site, seed=0, base=nn.Linear(6, 4, device="meta"))
    with pytest.raises(ModelError, match=r"its weight is quantised \(torch.int8"):
        AdapterLayer(adapter, site, seed=0, weight=torch.zeros(4, 6, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"got a weight of shape \(5, 6\); expected \(4, 6\)"):
        AdapterLayer(adapter, site, seed=0, weight=torch.zeros(5, 6))


def test_personal_leaves_do_not_travel() -> None:
    layer = AdapterLayer(create("nano", rank=2, personal=("B",)), BRIDGE, seed=0)
    assert set(layer.travelling()) == {"A"}
    assert layer.uplink_bytes() == 6 * 2 * 4
    assert layer.parameter_count() == 24
    with pytest.raises(ConfigError, match="personal leaf 'C' does not exist; leaves: A, B"):
        AdapterLayer(create("nano", rank=2, personal=("C",)), BRIDGE, seed=0)
