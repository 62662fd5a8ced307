"""What each paper promises, in miniature, with the comparison that the promise is about."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fednano.adapters import AdapterLayer, Site, attach, create, plan
from fednano.adapters.lamda import frozen_columns
from fednano.adapters.loca import dct_rows, location_gradient
from fednano.adapters.sparse import switch
from fednano.adapters.wara import WaRA
from fednano.adapters.xs import rank_for_energy


def fit(layer: AdapterLayer, x: Tensor, y: Tensor, steps: int, rate: float) -> AdapterLayer:
    optimizer = torch.optim.Adam(layer.theta.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    return layer


def gap(layer: AdapterLayer, change: Tensor) -> float:
    """Relative distance of the learnt change from the planted one."""
    return float((layer.delta().detach() - change).norm() / change.norm())


@pytest.mark.parametrize("seed", [0, 1])
def test_lora_sb_needs_a_27th_of_loras_parameters(seed: int) -> None:
    """A change whose entries have similar sizes in blocks, as a sign-like first step has; noisy labels, held-out
    loss."""
    generator = torch.Generator().manual_seed(seed)
    d = 64
    weight = torch.randn(d, d, generator=generator) / 8
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    blocks = signs * (1 + 0.5 * torch.rand(4, 4, generator=generator))
    change = torch.kron(blocks, torch.ones(16, 16)) / 16
    x, test = torch.randn(1024, d, generator=generator), torch.randn(1000, d, generator=generator)
    y = x @ (weight + change).T + 0.5 * torch.randn(1024, d, generator=generator)
    gradient = -(y - x @ weight.T).T @ x
    site = Site("w", "linear", d, d)

    def best(name: str, rates: tuple[float, ...], **options: object) -> tuple[float, int]:
        losses = []
        for rate in rates:
            layer = AdapterLayer(
                create(name, **options), site, seed=seed, weight=weight, stats={"gradient": gradient}
            )
            fit(layer, x, y, 60, rate)
            losses.append(float((layer(test) - test @ (weight + change).T).detach().square().mean()))
        return min(losses), layer.parameter_count()

    lora, lora_size = best("lora", (0.003, 0.01, 0.03), rank=8)
    small, small_size = best("lora-sb", (0.03, 0.1, 0.3), rank=6, step=1 / 16)
    assert small_size * 27 <= lora_size
    assert small <= lora


def test_lora_sb_starts_at_the_best_approximation_of_the_first_step() -> None:
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    layer = AdapterLayer(
        create("lora-sb", rank=3, step=0.01, alpha=6.0),
        Site("w", "linear", 8, 12),
        seed=0,
        stats={"gradient": gradient},
    )
    step = -0.01 * gradient.sign()
    spectrum = torch.linalg.svdvals(step)
    assert float((layer.delta().detach() - step).norm()) == pytest.approx(
        float(spectrum[3:].norm()), rel=1e-5
    )


def test_nola_size_does_not_depend_on_rank_or_shape() -> None:
    sizes = {
        plan(
            create("nola", rank=r, coefficients_a=7, coefficients_b=9), [Site("w", "linear", i, o)]
        ).parameters
        for r in (1, 2, 8)
        for i, o in ((16, 8), (4096, 11008))
    }
    assert sizes == {16}


def test_nola_regenerates_what_it_does_not_store() -> None:
    site, options = Site("w", "linear", 64, 64), {"rank": 8, "coefficients_a": 64, "coefficients_b": 64}
    layers = [
        AdapterLayer(create("nola", store=store, **options), site, seed=0) for store in ("never", "always")
    ]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in "ab":
            noise = torch.randn(64, generator=generator)
            for layer in layers:
                layer.theta[name].copy_(noise)
    saved: list[list[int]] = []
    for layer in layers:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            layer(torch.ones(4, 64)).square().sum().backward()
        saved.append(sizes)
    assert max(saved[0]) < 64 * 8 * 64 / 8 < max(saved[1]) == 64 * 8 * 64
    torch.testing.assert_close(layers[0].delta(), layers[1].delta())
    torch.testing.assert_close(layers[0].theta["b"].grad, layers[1].theta["b"].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_loca_recovers_a_sparse_cosine_change_better_than_lora(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = 32
    c = dct_rows(d, torch.arange(d)).float()
    spectrum = torch.zeros(d * d)
    spectrum[torch.randperm(d * d, generator=generator)[:48]] = torch.randn(48, generator=generator)
    change = c.T @ spectrum.view(d, d) @ c
    weight = torch.randn(d, d, generator=generator) / 6
    x = torch.randn(400, d, generator=generator)
    y = x @ (weight + change).T
    stats = {"gradient": -(y - x @ weight.T).T @ x}
    site = Site("w", "linear", d, d)
    loca = AdapterLayer(
        create("loca", count=64, locations="gradient"), site, seed=0, weight=weight, stats=stats
    )
    lora = AdapterLayer(create("lora", rank=1), site, seed=0, weight=weight)
    assert loca.parameter_count() == lora.parameter_count()
    fit(loca, x, y, 200, 0.03)
    fit(lora, x, y, 200, 0.03)
    assert gap(loca, change) < 0.1
    assert gap(lora, change) > 0.5


def test_loca_location_gradient_is_the_central_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = 0.1 * torch.randn(6, 5, generator=generator).double()
    a, positions = torch.tensor([0.7, -0.4]).double(), torch.tensor([2 * 5 + 3, 1 * 5 + 1])
    rows, columns = dct_rows(6, torch.arange(6)), dct_rows(5, torch.arange(5))

    def loss(row: int, column: int, value: Tensor) -> Tensor:
        return value * (gradient * torch.outer(rows[row], columns[column])).sum()

    by_row, by_column = location_gradient(gradient, a, positions)
    for i, (row, column) in enumerate(((2, 3), (1, 1))):
        assert float(by_row[i]) == pytest.approx(
            float(loss(row + 1, column, a[i]) - loss(row - 1, column, a[i])) / 2
        )
        assert float(by_column[i]) == pytest.approx(
            float(loss(row, column + 1, a[i]) - loss(row, column - 1, a[i])) / 2
        )
    assert float(location_gradient(1000 * gradient, a, positions)[0].abs().max()) == 1


def _saved_bytes(layer: AdapterLayer) -> int:
    """Bytes of activations kept for the backward pass; parameters, buffers and the base's share are not counted."""
    x = torch.randn(1024, layer.site.d_in).requires_grad_()
    own = {value.untyped_storage().data_ptr() for value in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        held = layer(x)
    assert held.requires_grad
    return sum(kept.values())


def test_lamda_keeps_fewer_activations_than_lora() -> None:
    site, weight = Site("w", "linear", 256, 256), torch.randn(256, 256) / 16
    lora = AdapterLayer(create("lora", rank=8), site, seed=0, weight=weight)
    first = AdapterLayer(create("lamda", rank=8), site, seed=0, weight=weight)
    second = AdapterLayer(create("lamda", rank=8, frozen_columns=8), site, seed=0, weight=weight)
    assert _saved_bytes(lora) > 4 * _saved_bytes(first) >= 4 * _saved_bytes(second)


def test_lamda_phases() -> None:
    weight = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    layer = AdapterLayer(create("lamda", rank=4), Site("w", "linear", 8, 10), seed=0, weight=weight)
    x = torch.randn(20, 8)
    y = torch.randn(20, 10)
    assert [frozen_columns(step, 20, 4) for step in (0, 1, 2, 3, 6, 19)] == [0, 0, 1, 2, 4, 4]
    fingerprints = [layer.fingerprint()]
    for step in (0, 2, 4, 6):
        fit(layer, x, y, 3, 0.05)
        before = layer(x).detach()
        theta = {name: value.detach() for name, value in layer.theta.items()}
        layer.adopt(*layer.adapter.advance(theta, layer.basis, frozen_columns(step, 20, 4)))
        torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
        fingerprints.append(layer.fingerprint())
    assert set(layer.theta) == {"S"}
    assert layer.parameter_count() == 16
    assert len(set(fingerprints)) == 4  # the first call froze nothing; each later one made a new basis


@pytest.mark.parametrize("seed", [0, 1])
def test_sltrain_beats_low_rank_alone(seed: int) -> None:
    """A two-layer language model of bigrams from scratch; low rank alone gets a larger rank for the same number of
    parameters."""

    def train(sparse: bool) -> tuple[float, int]:
        torch.manual_seed(seed)
        embedding, head = nn.Embedding(32, 32), nn.Linear(32, 32)
        if sparse:
            net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
            adapters = attach(net, create("sltrain", rank=2, density=0.045), "{0,2}", seed=seed, freeze=False)
            size = adapters.parameter_count()
        else:
            low = [
                nn.Linear(32, 3, bias=False),
                nn.Linear(3, 64),
                nn.GELU(),
                nn.Linear(64, 3, bias=False),
                nn.Linear(3, 32),
            ]
            net, size = nn.Sequential(*low), 2 * 3 * (32 + 64)
        bigrams = torch.softmax(3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(5)), -1)
        generator = torch.Generator().manual_seed(seed)
        trained = [p for m in (net, embedding, head) for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.01)
        for _ in range(200):
            ids = torch.randint(0, 32, (256,), generator=generator)
            following = torch.multinomial(bigrams[ids], 1, generator=generator)[:, 0]
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(net(embedding(ids))), following).backward()
            optimizer.step()
        with torch.no_grad():
            return float(-(bigrams * head(net(embedding.weight)).log_softmax(-1)).sum(-1).mean()), size

    (both, size), (alone, larger) = train(True), train(False)
    assert size <= larger
    assert both < alone - 0.1


def test_shira_switches_faster_than_a_lora_is_fused() -> None:
    """Against ``W += B A``, as adapter libraries fuse; the same number of parameters, 0.8 % of the weight."""
    d, r = 2048, 8
    weight = torch.randn(d, d)
    site = Site("w", "linear", d, d)
    lora = AdapterLayer(create("lora", rank=r), site, seed=0, weight=weight)
    shira = AdapterLayer(create("shira", rank=r), site, seed=0, weight=weight)
    assert lora.parameter_count() == shira.parameter_count()
    a, b = lora.theta["A"].detach(), torch.randn(d, r)
    values, positions = torch.randn(shira.parameter_count()), shira.basis["positions"].sort().values

    def fuse() -> None:
        weight.add_(b @ a)

    def seconds(call: Callable[[], object]) -> float:
        runs = []
        for _ in range(15):
            start = time.perf_counter()
            call()
            runs.append(time.perf_counter() - start)
        return min(runs)  # the least disturbed run

    assert seconds(lambda: switch(weight, values, positions)) < seconds(fuse)


def test_shira_switch_restores_the_bits() -> None:
    weight = torch.randn(20, 30)
    before, positions = weight.clone(), torch.tensor([3, 599, 41])
    saved = switch(weight, torch.tensor([0.1, 1e-9, -3.0]), positions)
    assert int((weight != before).sum()) >= 2
    switch(weight, torch.zeros(3), positions, saved)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("support", "score"), [("magnitude", "w"), ("gradient", "g"), ("snip", "wg")])
def test_shira_supports_are_the_largest_scores(support: str, score: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(8, 12, generator=generator), torch.randn(8, 12, generator=generator)
    expected = {"w": w.abs(), "g": g.abs(), "wg": (w * g).abs()}[score].flatten().topk(20).indices
    layer = AdapterLayer(
        create("shira", rank=1, support=support),
        Site("w", "linear", 12, 8),
        seed=0,
        weight=w,
        stats={"gradient": g},
    )
    assert layer.basis["positions"].tolist() == expected.tolist()


# -- closed forms where no other library has the method ------------------------------------------------------


def test_svd_families_reproduce_the_weight() -> None:
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    site = Site("w", "linear", 7, 9)
    svfit = AdapterLayer(create("svfit", rank=7), site, seed=0, weight=weight)
    with torch.no_grad():
        svfit.theta["sigma"].zero_()
    torch.testing.assert_close(svfit.delta(), -weight, rtol=1e-4, atol=1e-5)
    loldu = AdapterLayer(create("loldu", rank=7), site, seed=0, weight=weight)
    with torch.no_grad():
        loldu.theta["z"].zero_()
    torch.testing.assert_close(loldu.delta(), -weight, rtol=1e-4, atol=1e-5)
    xs = AdapterLayer(create("lora-xs", rank=7), site, seed=0, weight=weight)
    with torch.no_grad():
        xs.theta["R"].copy_(torch.eye(7))
    torch.testing.assert_close(xs.delta(), weight, rtol=1e-4, atol=1e-5)
    salt = AdapterLayer(create("salt", rank=2, top=5), site, seed=0, weight=weight)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    with torch.no_grad():
        salt.theta["a"].fill_(2.0)
        salt.theta["b"].fill_(0.5)
    expected = (u[:, :5] * (s[:5] + 0.5)) @ vh[:5]
    torch.testing.assert_close(salt.delta(), expected, rtol=1e-4, atol=1e-5)


def test_loldu_survives_a_tiny_pivot() -> None:
    weight = torch.eye(5)
    weight[2, 2], weight[2, 4] = 1e-20, 1.0
    layer = AdapterLayer(create("loldu", rank=5), Site("w", "linear", 5, 5), seed=0, weight=weight)
    assert float(layer.basis["A"].abs().max()) <= 1e3
    with torch.no_grad():
        layer.theta["z"].zero_()
    torch.testing.assert_close(layer.delta(), -weight)


def test_large_weights_use_subspace_iteration_as_well() -> None:
    from fednano.adapters import bases

    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(1100, 40, generator=generator)).Q for _ in range(2))
    s = torch.tensor([0.9**k for k in range(40)])
    matrix = (u * s) @ v.T
    left, values, right = bases.top_svd(matrix, 8, 5)
    torch.testing.assert_close(values.float(), s[:8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        (left * values) @ right.T, ((u[:, :8] * s[:8]) @ v[:, :8].T).double(), rtol=0, atol=1e-4
    )


def test_rank_for_energy() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1]))
    assert [rank_for_energy(weight, share) for share in (0.5, 0.7, 0.99, 1.0)] == [1, 2, 3, 4]


def test_wara_is_the_haar_form() -> None:
    """Explicit Haar matrices; with shared bands they cancel, with own bands they do not."""

    def haar(n: int) -> Tensor:
        eye = torch.eye(n).double()
        return torch.cat([eye[0::2] + eye[1::2], eye[0::2] - eye[1::2]]) / 2**0.5

    site = Site("w", "linear", 6, 8)
    for bands in ("shared", "own"):
        adapter = create("wara", rank=2, bands=bands)
        assert isinstance(adapter, WaRA)
        layer = AdapterLayer(adapter, site, seed=0).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in layer.theta.values():
                value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
        products = [layer.theta[b] @ layer.theta[a] for a, b in adapter._names()]
        expected = haar(8).T @ torch.block_diag(*products) @ haar(6)
        torch.testing.assert_close(layer.delta(), expected)
        together = torch.kron(products[0], torch.eye(2).double())
        assert torch.allclose(expected, together) == (bands == "shared")


def test_mos_rows_are_put_together_from_shards() -> None:
    sites = [Site(f"{i}.q", "linear", 6, 4).in_group("q", 2, i) for i in range(2)]
    adapter = create("mos", rank=3, pool_rank=2, shards=2, private_rank=1, alpha=6.0)
    layer = AdapterLayer(adapter, sites[1], seed=0)
    with torch.no_grad():
        layer.theta["pool_B"].normal_()
        layer.theta["own_B"].normal_()
    rows = {}
    for name in "AB":
        pool, own, index = (
            layer.theta[f"pool_{name}"],
            layer.theta[f"own_{name}"],
            layer.basis[f"index_{name}"],
        )
        assert len(set(index.tolist())) == 4
        pieces = [own[0], own[1], *(pool[i] for i in index)]
        rows[name] = torch.stack([torch.cat(pieces[2 * q : 2 * q + 2]) for q in range(3)])
    torch.testing.assert_close(layer.delta(), 2 * rows["B"].T @ rows["A"])
    other = AdapterLayer(adapter, sites[0], seed=0)
    assert torch.equal(other.theta["pool_A"], layer.theta["pool_A"])
    assert not torch.equal(other.theta["own_A"], layer.theta["own_A"])


def test_tlora_by_explicit_traces() -> None:
    layer = AdapterLayer(
        create("tlora", rank=2, transform_rank=2, factors=2),
        Site("w", "linear", 6, 4),
        seed=0,
        weight=torch.randn(4, 6),
    )
    with torch.no_grad():
        for value in layer.theta.values():
            value.add_(0.3 * torch.randn(value.shape))
    theta = {name: value.detach() for name, value in layer.theta.items()}
    t, residual = layer.adapter.transform(layer.site, theta), layer.adapter.residual(layer.site, theta)
    for i1, i2, j1, j2 in ((0, 1, 2, 0), (2, 0, 1, 1)):
        trace = torch.trace(theta["T0"][i1, j1] @ theta["T1"][i2, j2])
        assert float(t[2 * i1 + i2, 2 * j1 + j2]) == pytest.approx(float(trace), rel=1e-4)
    for o1, o2, i1, i2 in ((0, 1, 2, 0), (1, 0, 1, 1)):
        chain = theta["D0"][o1] @ theta["D1"][o2] @ theta["D2"][i1] @ theta["D3"][i2]
        assert float(residual[2 * o1 + o2, 2 * i1 + i2]) == pytest.approx(float(torch.trace(chain)), rel=1e-4)


def test_convlora_is_a_reinterpreted_product_and_lora_a_chain_of_convolutions() -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False)
    site = Site.of("c", conv)
    layer = AdapterLayer(create("convlora", rank=2), site, seed=0, base=conv)
    with torch.no_grad():
        layer.theta["B"].normal_()
    kernel = (layer.theta["B"] @ layer.theta["A"]).view(6, 4, 3, 3)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, conv.weight + kernel), rtol=1e-4, atol=1e-5)


def test_dropout_is_on_the_path_only_and_off_in_eval() -> None:
    layer = AdapterLayer(create("lora", rank=2, dropout=0.5), Site("b", "bridge", 64, 64), seed=0)
    with torch.no_grad():
        layer.theta["B"].normal_()
    x = torch.randn(3, 64)
    torch.manual_seed(0)
    noisy = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(noisy, x + dropped @ layer.delta().T)
    layer.eval()
    torch.testing.assert_close(layer(x), x + x @ layer.delta().T)
