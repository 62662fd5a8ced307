"""FILA against a dense solution in float64, its invariance, and what survives saving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fednano.adapters import attach as attach_adapter
from fednano.adapters import attach_checkpoint, create, save_checkpoint
from fednano.errors import ConfigError, DataError, ModelError
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LocalLLM
from fednano.training.data import ClientData
from fednano.training.targets import without_end
from fednano.unlearning.fila import (
    Fila,
    Pair,
    as_lora,
    attach_fila,
    factorise,
    factorise_product,
)
from fednano.unlearning.fila_bridge import bridge_fisher, change_pairs, prepare
from fednano.unlearning.fisher import row_weights, row_weights_from_sums, weight_fisher

Tuned = Callable[..., NanoEdge]

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**31)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int, seed: int) -> Tensor:
    return normal(*shape, seed=seed).exp()


def weighted_error(weight: Tensor, pair: Pair, rows: Tensor) -> float:
    return float((rows[:, None] * (weight - pair.matrix())).square().sum())


@settings(deadline=None, max_examples=40)
@given(m=SIZES, n=SIZES, seed=SEEDS, data=st.data())
def test_factorisation_is_the_eckart_young_solution(m: int, n: int, seed: int, data: Any) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    weight, rows = normal(m, n, seed=seed), positive(m, seed=seed + 1)
    pair = factorise(weight, rows, rank)
    values = torch.linalg.svdvals(rows[:, None] * weight)
    least = float(values[rank:].square().sum())  # what no matrix of this rank can go below
    assert weighted_error(weight, pair, rows) == pytest.approx(least, rel=1e-9, abs=1e-12)
    # The same matrix from the eigenvectors of the Gram matrix, a dense route of its own.
    scaled = rows[:, None] * weight
    _, vectors = torch.linalg.eigh(scaled.T @ scaled)
    dense = scaled @ vectors[:, n - rank :] @ vectors[:, n - rank :].T / rows[:, None]
    gap = values[rank - 1] - (values[rank] if rank < min(m, n) else 0)
    if float(gap) > 1e-3 * float(values[0]):
        torch.testing.assert_close(pair.matrix(), dense, rtol=1e-6, atol=1e-6)
    # Not the plain SVD: rows that count more are met more closely.
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    plain = Pair(s[:rank, None] * vh[:rank], u[:, :rank])
    assert weighted_error(weight, pair, rows) <= weighted_error(weight, plain, rows) * (1 + 1e-9) + 1e-12


@settings(deadline=None, max_examples=40)
@given(m=SIZES, n=SIZES, k=st.integers(1, 12), seed=SEEDS, data=st.data())
def test_product_is_factorised_as_the_dense_matrix_and_nothing_is_lost(
    m: int, n: int, k: int, seed: int, data: Any
) -> None:
    rank = data.draw(st.integers(1, k))
    left, right, rows = normal(m, k, seed=seed), normal(k, n, seed=seed + 1), positive(m, seed=seed + 2)
    first, rest = factorise_product(left, right, rows, rank)
    assert first.A.shape[0] + rest.A.shape[0] == k
    torch.testing.assert_close(first.matrix() + rest.matrix(), left @ right, rtol=1e-9, atol=1e-9)
    dense = left @ right
    values = torch.linalg.svdvals(rows[:, None] * dense)
    least = float(values[rank:].square().sum())
    assert weighted_error(dense, first, rows) == pytest.approx(least, rel=1e-8, abs=1e-9)


def test_ranks_out_of_range_are_refused() -> None:
    weight, rows = normal(4, 3, seed=0), torch.ones(4)
    for rank in (0, 4):
        with pytest.raises(ConfigError, match="expected 1 to 3"):
            factorise(weight, rows, rank)
    with pytest.raises(ConfigError, match="adapter of rank 2"):
        factorise_product(normal(4, 2, seed=0), normal(2, 4, seed=1), rows, 3)


@settings(deadline=None, max_examples=40)
@given(m=SIZES, n=SIZES, seed=SEEDS, a=st.floats(1e-20, 1e20), b=st.floats(1e-20, 1e20))
def test_row_weights_do_not_change_with_the_scale_of_a_fisher(
    m: int, n: int, seed: int, a: float, b: float
) -> None:
    forget, retain = positive(m, n, seed=seed), positive(m, n, seed=seed + 1)
    expected = row_weights(forget, retain)
    torch.testing.assert_close(row_weights(a * forget, b * retain), expected, rtol=1e-8, atol=0)
    eps = 1e-3 * retain.mean()
    d = torch.stack([(f / (r + eps)).sum().sqrt() for f, r in zip(forget, retain, strict=True)])
    torch.testing.assert_close(expected, d / d.square().mean().sqrt(), rtol=1e-9, atol=0)
    sums = row_weights_from_sums(a * forget.sum(1), b * retain.sum(1))
    torch.testing.assert_close(sums, row_weights_from_sums(forget.sum(1), retain.sum(1)), rtol=1e-8, atol=0)


def test_row_weights_of_special_fishers() -> None:
    some, none = positive(3, 4, seed=0), torch.zeros(3, 4)
    assert torch.equal(row_weights(none, some), torch.ones(3, dtype=torch.float64))
    d = some.sum(1).sqrt()
    torch.testing.assert_close(row_weights(some, none), d / d.square().mean().sqrt())
    lone = torch.zeros(3, 4)
    lone[1] = 1
    weights = row_weights(lone, some)
    assert weights.min() == 1e-2  # no row is divided by almost nothing
    # For retained Fishers without structure the row sums say all.
    flat = torch.full((3, 4), 0.7)
    torch.testing.assert_close(row_weights(some, flat), row_weights_from_sums(some.sum(1), flat.sum(1)))
    for bad in (-some, some * float("nan")):
        with pytest.raises(DataError, match="negative or not finite"):
            row_weights(bad, some)
    with pytest.raises(DataError, match="shapes"):
        row_weights(some, some[:2])
    with pytest.raises(ConfigError, match="floor"):
        row_weights(some, some, floor=-1)


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


SITES = "model.layers.*.{self_attn.{q,o}_proj,mlp.{gate,down}_proj}"


def llama_fishers(model: LlamaForCausalLM) -> list[dict[str, Tensor]]:
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    ids = torch.randint(60, (6, 9), generator=torch.Generator().manual_seed(1))

    def nll(row: Tensor) -> Tensor:
        return 8 * model(input_ids=row[None], labels=row[None]).loss

    return [weight_fisher(weights, [lambda r=r: nll(r) for r in rows]) for rows in (ids[:2], ids[2:])]


def test_weight_fisher_is_per_sample_and_leaves_flags_alone() -> None:
    model = llama().requires_grad_(False)
    forget, _ = llama_fishers(model)
    assert not any(p.requires_grad for p in model.parameters())
    name = "model.layers.0.mlp.gate_proj"
    weight = model.get_submodule(name).weight.requires_grad_()
    ids = torch.randint(60, (6, 9), generator=torch.Generator().manual_seed(1))
    grads = []
    for row in ids[:2]:
        logits = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        nll = -logits[torch.arange(8), row[1:]].sum()
        grads.append(torch.autograd.grad(nll, weight)[0])
    expected = torch.stack(grads).double().square().mean(0)
    torch.testing.assert_close(forget[name], expected, rtol=1e-4, atol=1e-10)
    batch = torch.stack(grads).mean(0).double().square()
    assert float(batch.sum()) < 0.8 * float(expected.sum())  # what the square of a mean gradient loses
    with pytest.raises(DataError, match="at least one sample"):
        weight_fisher({name: weight}, [])


def test_linear_sites_start_unchanged_train_and_survive_saving(tmp_path: Path) -> None:
    model = llama()
    ids = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(2))
    untouched = copy.deepcopy(model.state_dict())
    before = model(input_ids=ids).logits.detach()
    forget, retain = llama_fishers(model)
    adapters = attach_fila(model, SITES, forget, retain, rank=4, alpha=8.0)
    assert torch.equal(model(input_ids=ids).logits, before)  # to the bit
    optimizer = torch.optim.Adam(adapters.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (-model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
    frozen = {name: layer.basis for name, layer in adapters.layers.items()}
    after = model(input_ids=ids).logits.detach()
    assert float((after - before).abs().max()) > 0.01
    as_lora(adapters)
    for name, layer in adapters.layers.items():
        assert layer.adapter.spec == create("lora", rank=8, alpha=16.0).spec
        assert torch.equal(layer.theta["A"][4:], frozen[name]["A0"])
    torch.testing.assert_close(model(input_ids=ids).logits, after, rtol=0, atol=1e-5)
    save_checkpoint(tmp_path / "unlearned", adapters)
    fresh = llama()
    attach_checkpoint(fresh, tmp_path / "unlearned")
    torch.testing.assert_close(fresh(input_ids=ids).logits, after, rtol=0, atol=1e-5)
    adapters.detach()
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched[name]), name  # the frozen model is what it was


def test_rank_2r_pair_is_the_identity_before_training() -> None:
    model = llama()
    ids = torch.randint(60, (3, 12), generator=torch.Generator().manual_seed(2))
    before = model(input_ids=ids).logits.detach()
    adapters = attach_fila(model, SITES, *llama_fishers(model), rank=16)
    as_lora(adapters)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-5)


def test_linear_sites_refuse_what_does_not_fit() -> None:
    model = llama()
    forget, retain = llama_fishers(model)
    with pytest.raises(ConfigError, match="rank up to 16"):
        attach_fila(model, SITES, forget, retain, rank=17)
    with pytest.raises(DataError, match="no Fisher for site"):
        attach_fila(model, SITES, {}, retain, rank=4)
    lora = attach_adapter(model, create("lora", rank=2), "model.layers.0.mlp.up_proj", seed=0)
    with pytest.raises(ModelError, match="no FILA"):
        as_lora(lora)
    lora.detach()
    with pytest.raises(ModelError, match="attach_fila"):
        attach_adapter(model, Fila(rank=2), "model.layers.0.mlp.up_proj", seed=0)


def outputs(nano: NanoEdge, data: ClientData) -> Tensor:
    with torch.no_grad():
        return nano(*data.batch(range(len(data)))).embeds


@pytest.mark.parametrize(
    ("kind", "options"), [("nano", {"rank": 6, "scale": -0.5}), ("lora", {"rank": 5, "alpha": 10.0})]
)
def test_bridge_starts_unchanged_and_keeps_what_is_not_trained(
    kind: str, options: dict[str, Any], tuned: Tuned, data: ClientData
) -> None:
    nano = tuned(kind, **options)
    before, start = outputs(nano, data), nano.travelling()
    rows = {stream: positive(24, seed=3) for stream in nano.layers}
    prepared = prepare(nano, rows, 2)
    assert prepared.error < 1e-5
    assert prepared.ranks == {"image": 2, "text": 2}
    assert all(torch.equal(nano.travelling()[n], leaf) for n, leaf in start.items())  # only looked at
    old = {stream: nano.layer(stream).delta().detach().double() for stream in nano.layers}
    nano.load_travelling(prepared.leaves)
    torch.testing.assert_close(outputs(nano, data), before, rtol=0, atol=1e-5)
    zero = change_pairs(nano, prepared, prepared.leaves)
    assert all(float(pair.matrix().abs().max()) < 1e-5 for pair in zero.values())
    after = {
        name: leaf + 0.1 * normal(*leaf.shape, seed=5).float() * prepared.moving[name]
        for name, leaf in prepared.leaves.items()
    }
    nano.load_travelling(after)
    for stream, pair in change_pairs(nano, prepared, after).items():
        assert pair.A.shape == (4, 24)  # rank 2r
        now = nano.layer(stream).delta().detach().double()
        torch.testing.assert_close(old[stream] + pair.matrix().double(), now, rtol=0, atol=1e-5)
        # What is left of the old change when the pair's own half is taken out: the dense residual.
        u, s, vh = torch.linalg.svd(rows[stream][:, None] * old[stream])
        part = (u[:, :2] * s[:2]) @ vh[:2] / rows[stream][:, None]
        frozen = old[stream] - part
        taken = old[stream] + (pair.B[:, 2:] @ pair.A[2:]).double()
        torch.testing.assert_close(taken, frozen, rtol=0, atol=1e-5)


def test_a_stream_that_learnt_nothing_is_left_alone(tuned: Tuned) -> None:
    nano = tuned(rank=3)
    with torch.no_grad():
        nano.layer("image").theta["B"].zero_()
    prepared = prepare(nano, {stream: torch.ones(24) for stream in nano.layers}, 8)
    assert prepared.ranks == {"text": 3}
    assert torch.equal(prepared.leaves["image.A"], nano.travelling()["image.A"])
    assert all(bool(mask.all()) for mask in prepared.moving.values())


def test_adapters_that_are_no_product_are_refused(tuned: Tuned) -> None:
    rows = {"image": torch.ones(24), "text": torch.ones(24)}
    with pytest.raises(ConfigError, match=r"product of two factors.*'ihl'"):
        prepare(tuned(rank=2, act="gelu"), rows, 1)
    with pytest.raises(ConfigError, match="expected at least 1"):
        prepare(tuned(rank=2), rows, 0)


def test_bridge_fisher_is_the_squared_gradient_of_the_dense_change(
    parts: tuple[EdgePart, LocalLLM], tuned: Tuned, data: ClientData
) -> None:
    """Against autograd in a dense matrix put beside the adapter, one sample at a time."""
    nano, llm = tuned(rank=2), parts[1]
    indices = [0, 3, 5]
    got = bridge_fisher(nano, llm, data, indices, end=False, batch_size=2)
    total = torch.zeros(24, 24, dtype=torch.float64)
    for index in indices:
        batch = nano(*data.batch([index]))
        dense = torch.zeros(24, 24, requires_grad=True)
        embeds = batch.embeds.detach() + batch.raw @ dense.T
        labels = without_end(batch.labels, nano.edge.tokenizer.eos_token_id)
        hidden = llm.part.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
        keep = labels[0, 1:] != -100
        log_p = llm.part.head(hidden[:-1][keep]).log_softmax(-1)
        nll = -log_p.gather(1, labels[0, 1:][keep][:, None]).sum()
        total += torch.autograd.grad(nll, dense)[0].double().square()
    torch.testing.assert_close(got["text"], total / 3, rtol=1e-4, atol=1e-10)
    assert not bool(got["image"].any())  # these samples have no image
    with_end = bridge_fisher(nano, llm, data, indices)
    assert not torch.allclose(with_end["text"], got["text"])


def test_the_end_token_is_left_out_once() -> None:
    labels = torch.tensor([[-100, 5, 2], [-100, 2, 2], [-100, -100, 2], [3, 4, 5], [5, 2, -100]])
    expected = torch.tensor([[-100, 5, -100], [-100, 2, -100], [-100, -100, 2], [3, 4, 5], [5, -100, -100]])
    assert torch.equal(without_end(labels, 2), expected)
    assert torch.equal(without_end(labels, None), labels)
