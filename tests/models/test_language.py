"""`LocalLLM` against the undivided Hugging Face models."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fednano.errors import ConfigError, HostRefused
from fednano.models.language import IGNORE, LanguageModel, LanguagePart, LocalLLM

D, V, POSITIONS = 32, 61, 48
SIZES: dict[str, Any] = {
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "mistral": (MistralForCausalLM, MistralConfig(sliding_window=5, **SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
}


def whole_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    make, config = KINDS[kind]
    torch.manual_seed(7)
    return make(config).to(dtype).eval()


def part_of(model: Any, eos: tuple[int, ...] = (2,)) -> LanguagePart:
    return LanguagePart(model.model, model.lm_head, D, V, POSITIONS, eos, 0, "none")


MODELS = {kind: whole_model(kind) for kind in KINDS}
WIDE = {kind: whole_model(kind, torch.float64) for kind in KINDS}


def make_batch(lengths: list[int], pads: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random embeddings, mask and labels; row i has ``pads[i]`` places of padding before it, and some after."""
    g = torch.Generator().manual_seed(seed)
    total = max(n + p for n, p in zip(lengths, pads, strict=True))
    embeds = torch.randn(len(lengths), total, D, generator=g)
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    labels = torch.full((len(lengths), total), IGNORE)
    for i, (n, p) in enumerate(zip(lengths, pads, strict=True)):
        mask[i, p : p + n] = True
        row = torch.randint(V, (n,), generator=g)
        labels[i, p : p + n] = torch.where(torch.rand(n, generator=g) < 0.6, row, IGNORE)
        labels[i, p + n - 1] = row[-1]
    return embeds, mask, labels


def reference(model: Any, embeds: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample losses and gradients of the whole model, each sample alone and unpadded, full logits."""
    losses, grad = [], torch.zeros_like(embeds)
    for i, real in enumerate(mask):
        x = embeds[i : i + 1, real].clone().requires_grad_()
        logits = model(inputs_embeds=x, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[i, real][1:], ignore_index=IGNORE)
        (grad[i, real],) = torch.autograd.grad(loss, x)
        losses.append(loss.detach())
    return torch.stack(losses), grad


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


rows = st.lists(st.tuples(st.integers(2, 16), st.integers(0, 6)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=25, deadline=None)
@given(rows=rows, seed=st.integers(0, 2**31))
def test_loss_and_gradient_equal_the_whole_model(kind: str, rows: list[tuple[int, int]], seed: int) -> None:
    embeds, mask, labels = make_batch([n for n, _ in rows], [p for _, p in rows], seed)
    truth = reference(WIDE[kind], embeds.double(), mask, labels)
    plain = reference(MODELS[kind], embeds, mask, labels)
    for models, dtype in ((WIDE, torch.float64), (MODELS, torch.float32)):
        x = embeds.to(dtype).requires_grad_()
        got = LocalLLM(part_of(models[kind])).loss(x, mask, labels)
        (grad,) = torch.autograd.grad(got.sum(), x)
        assert got.shape == (len(rows),)
        assert bool((grad[~mask] == 0).all())
        for ours, theirs, true in zip((got.detach(), grad), plain, truth, strict=True):
            # In float32 the whole model itself may be further than 1e-6 from the truth.
            bound = 1e-12 if dtype == torch.float64 else max(1e-6, 2 * relative(theirs, true))
            assert relative(ours, true) < bound


@pytest.mark.parametrize("kind", list(KINDS))
def test_padded_hugging_face_batch_gives_the_same(kind: str) -> None:
    """The oracle is the whole model run on the padded batch itself, with its own attention mask."""
    model, lengths = WIDE[kind], [3, 11, 7]
    for pads in ([0, 0, 0], [8, 0, 4]):
        embeds, mask, labels = make_batch(lengths, pads, 5)
        x = embeds.double().requires_grad_()
        ids = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = model(inputs_embeds=x, attention_mask=mask.long(), position_ids=ids).logits[:, :-1]
        keep = (labels[:, 1:] != IGNORE) & mask[:, :-1]
        per_token = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten().clamp(min=0), reduction="none"
        ).view(keep.shape)
        want = torch.where(keep, per_token, 0).sum(1) / keep.sum(1)
        (dx,) = torch.autograd.grad(want.sum(), x)
        y = embeds.double().requires_grad_()
        got = LocalLLM(part_of(model)).loss(y, mask, labels)
        (grad,) = torch.autograd.grad(got.sum(), y)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grad, dx, rtol=1e-9, atol=1e-12)


def test_rows_of_the_gradient_belong_to_their_losses() -> None:
    llm = LocalLLM(part_of(MODELS["llama"]))
    embeds, mask, labels = make_batch([5, 9, 4], [0, 0, 3], 2)
    x = embeds.requires_grad_()
    weights = torch.tensor([0.5, 0.0, -2.0])
    (weighted,) = torch.autograd.grad((llm.loss(x, mask, labels) * weights).sum(), x)
    (plain,) = torch.autograd.grad(llm.loss(x, mask, labels).sum(), x)
    torch.testing.assert_close(weighted, plain * weights[:, None, None], rtol=1e-5, atol=1e-7)


def test_weights_never_get_gradients_and_logits_only_at_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole_model("llama")
    llm = LocalLLM(part_of(model))
    seen: list[int] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    embeds, mask, labels = make_batch([9, 6], [0, 2], 4)
    labels[:] = IGNORE
    labels[0, 4], labels[0, 8], labels[1, 5] = 3, 4, 5
    llm.loss(embeds.requires_grad_(), mask, labels).sum().backward()
    handle.remove()
    assert seen == [3]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert embeds.grad is not None
    assert not llm.loss(embeds.detach(), mask, labels).requires_grad


@pytest.mark.parametrize("objective", ["inverted_hinge", "gradient_ascent"])
def test_other_objectives_reach_the_loss(objective: str) -> None:
    model = MODELS["qwen2"]
    embeds, mask, labels = make_batch([6], [0], 8)
    logits = model(inputs_embeds=embeds).logits[0, :-1]
    p = logits.softmax(-1)
    total, count = 0.0, 0
    for row, y in zip(p, labels[0, 1:].tolist(), strict=True):
        if y != IGNORE:
            others = torch.cat([row[:y], row[y + 1 :]])
            total += (
                float(1 + row[y] - others.max()) if objective == "inverted_hinge" else float(row[y].log())
            )
            count += 1
    got = LocalLLM(part_of(model)).loss(embeds, mask, labels, objective)
    assert got.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=8, deadline=None)
@given(rows=rows, seed=st.integers(0, 2**31), new=st.integers(1, 8))
def test_generation_equals_hugging_face(kind: str, rows: list[tuple[int, int]], seed: int, new: int) -> None:
    model = MODELS[kind]
    embeds, mask, _ = make_batch([n for n, _ in rows], [p for _, p in rows], seed)
    eos = (2, 17, 30)
    got = LocalLLM(part_of(model, eos)).generate(embeds, mask, new)
    assert got.shape == (len(rows), new)
    for i, real in enumerate(mask):
        want = model.generate(
            inputs_embeds=embeds[i : i + 1, real],
            attention_mask=torch.ones(1, int(real.sum()), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=list(eos),
            pad_token_id=0,
        )[0]
        assert got[i].tolist() == want.tolist() + [0] * (new - len(want))


def test_generation_with_adapted_token_embeddings() -> None:
    """Each new token passes through the caller's own embedding, as a teacher-forced pass would see it."""
    model = MODELS["llama"]
    table = model.model.embed_tokens.weight
    twist = torch.linspace(0.2, 1.8, D)
    embeds, mask, _ = make_batch([4, 7], [3, 0], 21)
    llm = LocalLLM(part_of(model, eos=()))
    got = llm.generate(embeds, mask, 6, embed=lambda ids: table[ids] * twist)
    for i, real in enumerate(mask):
        x = torch.cat([embeds[i, real], table[got[i]] * twist])
        logits = model(inputs_embeds=x[None]).logits[0]
        n = int(real.sum())
        assert logits[n - 1 : n + 5].argmax(-1).tolist() == got[i].tolist()
    assert got.tolist() != llm.generate(embeds, mask, 6).tolist()
    with pytest.raises(HostRefused, match=r"embed: got shape \(2, 3\)"):
        llm.generate(embeds, mask, 2, embed=lambda ids: torch.zeros(2, 3))


def test_rows_end_at_an_end_token_and_early_stop_keeps_the_shape() -> None:
    model = MODELS["llama"]
    embeds, mask, _ = make_batch([4, 5], [0, 0], 1)
    free = LocalLLM(part_of(model, eos=())).generate(embeds, mask, 6)
    stop = (int(free[0, 0]), int(free[1, 0]))
    got = LocalLLM(part_of(model, eos=stop)).generate(embeds, mask, 6)
    assert got.tolist() == [[stop[0], 0, 0, 0, 0, 0], [stop[1], 0, 0, 0, 0, 0]]


def test_same_call_same_bits_also_from_many_threads() -> None:
    llm = LocalLLM(part_of(MODELS["mistral"]))
    calls = [make_batch([3 + i, 9], [0, i], i) for i in range(6)]

    def step(call: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = call[0].clone().requires_grad_()
        loss = llm.loss(x, *call[1:])
        (grad,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), grad

    want = [step(call) for call in calls]
    got: dict[int, tuple[Tensor, Tensor]] = {}
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: step(calls[i])}))  # type: ignore[misc]
        for i in range(6)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, (loss, grad) in enumerate(want):
        assert torch.equal(got[i][0], loss)
        assert torch.equal(got[i][1], grad)


def test_bfloat16_model_takes_float32_embeddings() -> None:
    llm = LocalLLM(part_of(whole_model("llama", torch.bfloat16)))
    embeds, mask, labels = make_batch([6, 8], [0, 0], 3)
    loss = llm.loss(embeds.requires_grad_(), mask, labels)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert embeds.grad is not None
    assert embeds.grad.dtype == torch.float32
    want, _ = reference(MODELS["llama"], embeds.detach(), mask, labels)
    torch.testing.assert_close(loss.detach(), want, rtol=0.1, atol=0.1)


def test_it_is_a_language_model() -> None:
    llm = LocalLLM(part_of(MODELS["llama"]))
    interface: LanguageModel = llm
    assert interface.hidden_size == D
    assert (llm.hidden_size, llm.vocab_size, llm.max_positions) == (D, V, POSITIONS)


GOOD = make_batch([4, 6, 3], [0, 0, 2], 0)


def _set(which: int, at: Any, value: Any) -> Any:
    def spoil(batch: list[Tensor]) -> None:
        batch[which][at] = value

    return spoil


def _replace(which: int, change: Any) -> Any:
    def spoil(batch: list[Tensor]) -> None:
        batch[which] = change(batch[which])

    return spoil


def _only_the_first_label(batch: list[Tensor]) -> None:
    batch[2][2] = IGNORE
    batch[2][2, 2] = 4


def _too_long(batch: list[Tensor]) -> None:
    n = POSITIONS + 1
    batch[:] = [torch.zeros(1, n, D), torch.ones(1, n, dtype=torch.bool), torch.ones(1, n, dtype=torch.int64)]


SPOIL: dict[str, Any] = {
    "width": _replace(0, lambda x: x[..., :-1]),
    "rank": _replace(0, lambda x: x[0]),
    "empty": _replace(0, lambda x: x[:0]),
    "dtype": _replace(0, lambda x: x.long()),
    "nan": _set(0, (1, 2, 3), float("nan")),
    "infinity": _set(0, (2, 0, 0), float("inf")),
    "mask shape": _replace(1, lambda x: x[:, :-1]),
    "mask float": _replace(1, lambda x: x.float()),
    "mask two": _replace(1, lambda x: x.long() * 2),
    "mask zero": _set(1, 1, False),
    "mask hole": _set(1, (1, 2), False),
    "labels shape": _replace(2, lambda x: x[:2]),
    "labels dtype": _replace(2, lambda x: x.int()),
    "label big": _set(2, (2, 4), V),
    "label negative": _set(2, (0, 1), -1),
    "label on padding": _set(2, (0, 5), 3),
    "no label": _set(2, 1, IGNORE),
    "first label only": _only_the_first_label,
    "long": _too_long,
}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("width", r"embeds: got shape \(3, 6, 31\), expected \(B, T, 32\)"),
        ("rank", r"embeds: got shape \(6, 32\)"),
        ("empty", r"embeds: got shape \(0, 6, 32\), expected at least one sample"),
        ("dtype", r"embeds: got dtype torch.int64, expected float32"),
        ("nan", r"embeds: sample 1 holds NaN"),
        ("infinity", r"embeds: sample 2 holds NaN or infinity"),
        ("mask shape", r"mask: got shape \(3, 5\), expected \(3, 6\)"),
        ("mask float", r"mask: got dtype torch.float32, expected booleans"),
        ("mask two", r"mask: got dtype torch.int64, expected booleans, or integers that are 0 or 1"),
        ("mask zero", r"mask: sample 1 has no token"),
        ("mask hole", r"mask: sample 1 has padding between tokens"),
        ("labels shape", r"labels: got shape \(2, 6\), expected \(3, 6\)"),
        ("labels dtype", r"labels: got dtype torch.int32, expected torch.int64"),
        ("label big", rf"labels: sample 2 has label {V}; expected -100 or 0 to {V - 1}"),
        ("label negative", r"labels: sample 0 has label -1"),
        ("label on padding", r"labels: sample 0 has a label on padding"),
        ("no label", r"labels: sample 1 has no label after its first token"),
        ("first label only", r"labels: sample 2 has no label after its first token"),
        ("long", rf"sample 0 has {POSITIONS + 1} tokens; the model has {POSITIONS} positions"),
    ],
)
def test_bad_input_is_refused_with_its_reason(what: str, message: str) -> None:
    batch = [t.clone() for t in GOOD]
    SPOIL[what](batch)
    with pytest.raises(HostRefused, match=message):
        LocalLLM(part_of(MODELS["llama"])).loss(*batch)


def test_bad_generation_and_objective_are_refused() -> None:
    llm = LocalLLM(part_of(MODELS["llama"]))
    embeds, mask, labels = GOOD
    with pytest.raises(HostRefused, match="max_new_tokens: got 0"):
        llm.generate(embeds, mask, 0)
    with pytest.raises(HostRefused, match="sample 1 has 6 tokens and asks for 43 new ones"):
        llm.generate(embeds, mask, 43)
    with pytest.raises(ConfigError, match="unknown objective"):
        llm.loss(embeds, mask, labels, "hinge")
