"""The properties that every adapter must have, at every kind of site it accepts, without exceptions by name.

An adapter may differ only through what it declares: algebra, basis, mergeable, starts_off_zero, replaces_base,
    resizable.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fednano.adapters import AdapterLayer, Algebra, Basis, create, names, philox, sites
from fednano.errors import ConfigError, ModelError


def _load_cases() -> object:
    spec = importlib.util.spec_from_file_location(
        "adapter_cases", Path(__file__).with_name("adapter_cases.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("adapter_cases", module)
    spec.loader.exec_module(module)
    return module


c = _load_cases()


def _pairs(kinds: list[str]) -> pytest.MarkDecorator:
    found = list(c.supported(kinds))
    return pytest.mark.parametrize(
        ("case", "kind"), found, ids=[f"{case.label}@{kind}" for case, kind in found]
    )


everywhere = _pairs(c.MAIN)
everywhere_and_more = _pairs(c.KINDS)  # also wide weights and grouped convolutions
every = pytest.mark.parametrize("case", c.CASES, ids=[case.label for case in c.CASES])


def base_output(layer: AdapterLayer, x: Tensor) -> Tensor:
    """What the layer would give without its adapter."""
    if layer.base is not None:
        return layer.base(x)
    return x if layer.site.kind == "bridge" else torch.zeros(())


def path(layer: AdapterLayer, x: Tensor) -> Tensor:
    theta = {name: value.detach() for name, value in layer.theta.items()}
    return layer.adapter.path(layer.site, x, theta, layer._tables(), layer._flat_weight())


def test_every_registered_adapter_is_here() -> None:
    assert {case.name for case in c.CASES} == set(names())


@everywhere_and_more
def test_a_path_is_the_delta_applied(case: object, kind: str) -> None:
    layer = c.move(c.build(case, kind)).double()
    x = c.inputs(layer.site, dtype=torch.float64)
    if layer.adapter.mergeable:
        expected = sites.apply(layer.site, x, layer.delta().detach())
        torch.testing.assert_close(path(layer, x), expected, rtol=1e-10, atol=1e-12)
        if not layer.adapter.replaces_base:
            torch.testing.assert_close(
                layer(x).detach(), base_output(layer, x) + expected, rtol=1e-10, atol=1e-12
            )
    else:
        for call in (layer.delta, layer.merge, layer.effective_weight):
            with pytest.raises(ModelError, match="is not one matrix"):
                call()


@everywhere
def test_b_starts_as_the_base_or_says_otherwise(case: object, kind: str) -> None:
    layer = c.build(case, kind)
    x = c.inputs(layer.site)
    same = torch.equal(layer(x), base_output(layer, x))
    assert same != layer.adapter.starts_off_zero


@everywhere
def test_c_merge_keeps_the_function_and_unmerge_the_bits(case: object, kind: str) -> None:
    layer = c.move(c.build(case, kind))
    if not layer.adapter.mergeable:
        pytest.skip("declared not mergeable")
    x = c.inputs(layer.site)
    before = layer(x).detach()
    parameter = None if layer.base is None else layer.base.weight
    bits = None if parameter is None else parameter.detach().clone()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    if layer.base is not None:
        assert layer.base.weight is parameter
        assert torch.equal(parameter, bits)
    assert torch.equal(layer(x), before)


@everywhere
def test_d_metadata_counts_are_the_real_ones_and_the_papers(case: object, kind: str) -> None:
    layer = c.build(case, kind)
    leaves = layer.adapter.leaves(layer.site)
    real = sum(value.numel() for value in layer.theta.values())
    assert (
        layer.parameter_count()
        == sum(leaf.numel for leaf in leaves.values())
        == real
        == case.count(layer.site)
    )
    for name, leaf in leaves.items():
        assert (tuple(layer.theta[name].shape), layer.theta[name].dtype) == (leaf.shape, leaf.dtype)
    frozen = layer.adapter.frozen(layer.site)
    assert {name: (tuple(v.shape), v.dtype) for name, v in layer.basis.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in frozen.items()
    }
    assert all(leaf.role in ("index", "frozen") for leaf in frozen.values())


@everywhere
def test_e_the_wire_carries_shared_leaves_only(case: object, kind: str) -> None:
    layer = c.build(case, kind)
    sent = layer.travelling()
    assert layer.uplink_bytes() == sum(value.numel() * value.element_size() for value in sent.values())
    assert not set(sent) & (set(layer.basis) | set(layer.adapter.frozen(layer.site)))
    assert not any(layer.adapter.leaves(layer.site)[name].role == "personal" for name in sent)
    assert all(
        not value.requires_grad and value.data_ptr() != layer.theta[n].data_ptr() for n, value in sent.items()
    )
    assert bool(layer.export_basis()) == (
        bool(layer.basis) and layer.adapter.basis in (Basis.WEIGHT, Basis.STATS)
    )


@everywhere
def test_f_the_declared_algebra_is_the_measured_one(case: object, kind: str) -> None:
    layer = c.move(c.build(case, kind)).double()
    x = c.inputs(layer.site, dtype=torch.float64)
    start = {name: value.detach().clone() for name, value in layer.theta.items()}
    shared = layer.travelling()
    generator = torch.Generator().manual_seed(1)

    def output(leaves: dict[str, Tensor]) -> Tensor:
        return layer.adapter.path(layer.site, x, {**start, **leaves}, layer._tables(), layer._flat_weight())

    clients = [
        {n: v + 0.3 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in shared.items()}
        for _ in range(5)
    ]
    mean = {name: torch.stack([client[name] for client in clients]).mean(0) for name in shared}
    outputs = torch.stack([output(client) for client in clients]).mean(0)
    error = float((output(mean) - outputs).norm() / (outputs - output({})).norm())
    affine = layer.adapter.algebra is Algebra.AFFINE
    assert error < 1e-12 if affine else error > 1e-6, error


@everywhere
def test_h_gradients_match_float64(case: object, kind: str) -> None:
    single = c.move(c.build(case, kind))
    double = c.move(c.build(case, kind)).double()
    x = c.inputs(single.site)
    wide = x.double() if x.is_floating_point() else x
    weight = torch.randn(single(x).shape, generator=torch.Generator().manual_seed(3))
    (single(x) * weight).sum().backward()
    if double.adapter.mergeable:  # through the dense delta: independent of path and its backward
        flat = sites.apply(double.site, wide, double.delta())
        (flat * weight.double()).sum().backward()
    else:
        (double(wide) * weight.double()).sum().backward()
    for name, value in double.theta.items():
        assert value.grad is not None
        error = (single.theta[name].grad.double() - value.grad).norm() / value.grad.norm().clamp_min(1e-12)
        assert float(error) < 1e-4, name


@everywhere
def test_h_backward_is_the_derivative(case: object, kind: str) -> None:
    layer = c.move(c.build(case, kind)).double()
    order = sorted(layer.theta)
    x = c.inputs(layer.site, dtype=torch.float64)

    def output(*leaves: Tensor) -> Tensor:
        return layer.functional(dict(zip(order, leaves, strict=True)), x)

    leaves = tuple(layer.theta[name].detach().requires_grad_() for name in order)
    assert torch.autograd.gradcheck(output, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["linear", "bridge"])
@every
def test_i_works_without_a_weight_or_says_that_it_cannot(case: object, kind: str) -> None:
    _, site = c.module_and_site(kind)
    adapter = case.create()
    refusal = ""
    try:
        adapter.leaves(site)
        layer = AdapterLayer(adapter, site, seed=0, stats=c.stats(site))
    except (ConfigError, ModelError) as error:
        refusal = str(error)
    if refusal:
        assert f"adapter {adapter.name!r}" in refusal
        assert repr(site.name) in refusal
        assert "needs a base weight" in refusal or "cannot sit on" in refusal
        return
    x = c.inputs(site)
    assert layer(x).shape == (*x.shape[:-1], site.d_out)
    assert bool(torch.isfinite(c.move(layer)(x)).all())


@everywhere
def test_j_resizing_keeps_the_ranks_that_stay(case: object, kind: str) -> None:
    layer = c.move(c.build(case, kind))
    x = c.inputs(layer.site)
    adapter = layer.adapter
    if not adapter.resizable:
        with pytest.raises(ConfigError, match="no rank that can be changed"):
            layer.resize(case.smaller)
        return
    size = getattr(adapter, adapter.size_option)
    layer.resize(case.smaller)
    small, leaves = layer(x), {name: v.detach().clone() for name, v in layer.theta.items()}
    layer.resize(size)
    if adapter.grows_silently:
        torch.testing.assert_close(layer(x), small, rtol=1e-5, atol=1e-5)
    c.move(layer, 0.0)
    layer.resize(case.smaller)
    assert torch.equal(layer(x), small)
    assert all(torch.equal(layer.theta[name], value) for name, value in leaves.items())
    if adapter.basis is Basis.SEED:  # whoever starts at this rank from the seed gets the same basis
        fresh = AdapterLayer(layer.adapter, layer.site, seed=0, base=layer.base)
        assert fresh.fingerprint() == layer.fingerprint()


@everywhere
def test_k_leaves_and_basis_carry_the_whole_state(case: object, kind: str) -> None:
    layer = c.move(c.build(case, kind))
    module, site = c.module_and_site(kind)
    basis = layer.export_basis() if layer.adapter.basis in (Basis.WEIGHT, Basis.STATS) else None
    copy = AdapterLayer(case.create(), site, seed=0, base=module, basis=basis)
    assert copy.fingerprint() == layer.fingerprint()
    copy.load_travelling(layer.travelling())
    for name, leaf in copy.leaves().items():
        if leaf.role == "personal":
            copy.theta[name].data.copy_(layer.theta[name])
    x = c.inputs(site)
    assert torch.equal(copy(x), layer(x))


@everywhere
def test_same_seed_same_bits(case: object, kind: str) -> None:
    a, b = c.build(case, kind), c.build(case, kind)
    assert a.fingerprint() == b.fingerprint()
    assert all(torch.equal(a.theta[name], b.theta[name]) for name in a.theta)


@pytest.mark.parametrize(
    ("case", "kind"), [(case, kind) for case in c.CASES for kind in c.KINDS if not c.fits(case, kind)]
)
def test_unsupported_sites_are_refused_with_a_way_out(case: object, kind: str) -> None:
    with pytest.raises(ModelError) as error:
        c.build(case, kind)
    _, site = c.module_and_site(kind)
    assert f"adapter {case.name!r}" in str(error.value)
    assert repr(site.name) in str(error.value)


@every
def test_empty_batches_and_strides(case: object) -> None:
    layer = c.move(c.build(case, "linear"))
    empty = layer(torch.zeros(0, 12))
    assert empty.shape == (0, 8)
    empty.sum().backward()
    x = torch.randn(12, 5, 3).transpose(0, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(case: object, dtype: torch.dtype) -> None:
    module, site = c.module_and_site("linear")
    assert module is not None
    layer = c.move(AdapterLayer(case.create(), site, seed=0, base=module.to(dtype), stats=c.stats(site)))
    out = layer(c.inputs(site, dtype=dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert all(value.dtype == torch.float32 and value.grad is not None for value in layer.theta.values())


@every
def test_half_precision_bases_on_the_wire_are_refused(case: object) -> None:
    layer = c.build(case, "linear")
    floats = [name for name, value in layer.basis.items() if value.is_floating_point()]
    for name in floats:
        for dtype in (torch.bfloat16, torch.float16):
            shipped = layer.export_basis(everything=True)
            shipped[name] = shipped[name].to(dtype)
            with pytest.raises(ModelError, match="A basis must keep every bit"):
                layer.load_basis(shipped)


@every
def test_shipped_bases_are_checked(case: object) -> None:
    layer = c.move(c.build(case, "linear"))
    shipped, promised = layer.export_basis(everything=True), layer.fingerprint()
    layer.load_basis(shipped, promised)
    assert layer.fingerprint() == promised
    for name, value in shipped.items():
        changed = {**shipped, name: value + 1}
        with pytest.raises(ModelError, match=f"has fingerprint [0-9a-f]{{64}}, expected {promised}"):
            layer.load_basis(changed, promised)
        with pytest.raises(ModelError, match="belongs to another model or rank"):
            layer.load_basis({**shipped, name: value[:1, ...].repeat(99, *[1] * (value.dim() - 1))})
        with pytest.raises(ModelError, match="got basis leaves"):
            layer.load_basis({other: v for other, v in shipped.items() if other != name})
        if value.is_floating_point():
            with pytest.raises(ModelError, match="are NaN or Inf"):
                layer.load_basis({**shipped, name: value * float("nan")})


@every
def test_rank_out_of_range(case: object) -> None:
    adapter = case.create()
    option = adapter.size_option
    if option not in case.options:
        pytest.skip("the size is given otherwise")
    with pytest.raises(ConfigError, match=f"got {option}=0; expected >= 1"):
        create(case.name, **{**case.options, option: 0})
    too_much = create(case.name, **{**case.options, option: 98})
    with pytest.raises(ConfigError, match=f"got {option}=98 at site 'model.linear'; expected"):
        AdapterLayer(too_much, c.module_and_site("linear")[1], seed=0)


def _same_gradients(layer: AdapterLayer, run: Callable[[Tensor], Tensor]) -> None:
    x = c.inputs(layer.site).requires_grad_()
    layer.zero_grad()
    layer(x).square().sum().backward()
    plain = {name: value.grad.clone() for name, value in layer.theta.items()}
    layer.zero_grad()
    run(x).square().sum().backward()
    for name, value in layer.theta.items():
        torch.testing.assert_close(value.grad, plain[name], rtol=1e-5, atol=1e-6)


# Compiling takes a second each: by default one adapter for each way to compute the path, all of them in the slow tier.
few = pytest.mark.parametrize(
    "case",
    {case.name: case for case in c.CASES if case.name in ("lora", "nola", "shira", "mos")}.values(),
    ids=lambda case: case.name,
)
compiling = pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")


@every
def test_gradient_checkpointing(case: object) -> None:
    layer = c.move(c.build(case, "linear"))
    _same_gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=False))


@compiling
@few
def test_compiles_without_graph_breaks(case: object) -> None:
    layer = c.move(c.build(case, "linear"))
    _same_gradients(layer, torch.compile(layer, backend="eager", fullgraph=True))
    torch._dynamo.reset()


@pytest.mark.slow
@compiling
@pytest.mark.parametrize("kind", ["linear", "conv2d", "bridge"])
@every
def test_compiles_with_its_backward(case: object, kind: str) -> None:
    if not c.fits(case, kind):
        pytest.skip("another kind of site")
    layer = c.move(c.build(case, kind))
    _same_gradients(layer, torch.compile(layer, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()


@pytest.mark.gpu
@everywhere
def test_g_basis_bits_are_equal_on_cpu_and_gpu(case: object, kind: str) -> None:
    module, site = c.module_and_site(kind)
    on_cpu = c.build(case, kind)
    on_gpu = AdapterLayer(
        case.create(), site, seed=0, base=None if module is None else module.cuda(), stats=c.stats(site)
    ).cuda()
    assert on_gpu.fingerprint() == on_cpu.fingerprint()
    for name, value in on_cpu.basis.items():
        assert torch.equal(on_gpu.basis[name].cpu(), value)
    for name, value in on_cpu.theta.items():
        assert torch.equal(on_gpu.theta[name].cpu(), value)
    x = c.inputs(site)
    expected, got = c.move(on_cpu)(x), c.move(on_gpu.cpu())  # the same noise on both
    torch.testing.assert_close(got.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_g_generator_bits_are_equal_on_cpu_and_gpu() -> None:
    k = philox.key(5, "site", "leaf")
    for draw in (philox.uniform, philox.normal):
        assert torch.equal(draw(k, (1000, 33)), draw(k, (1000, 33), device="cuda").cpu())
    planes = philox.uniform(k, (6, 999), planes=True, device="cuda")
    assert torch.equal(philox.uniform(k, (6, 999), planes=True), planes.cpu())
