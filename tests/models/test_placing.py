"""A language part over several devices: the cut, and that the program with its hooks computes the same."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from fednano.errors import ConfigError, ModelError
from fednano.host.loading import load_part
from fednano.models.blocks import _Forward
from fednano.models.language import LanguagePart, LocalLLM
from fednano.models.memory import Part
from fednano.models.placing import block_devices, lay_out_devices, parse_device_map, spread

D, V = 24, 40
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def llama(layers: int = 4) -> LanguagePart:
    torch.manual_seed(0)
    decoder = LlamaModel(LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, **SIZES))
    return LanguagePart(decoder.eval(), nn.Linear(D, V, bias=False), D, V, 64, (2,), 0, "random")


@given(st.integers(1, 40), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_blocks_go_in_order_and_each_device_has_some(blocks: int, shares: list[float]) -> None:
    if blocks < len(shares):
        with pytest.raises(ConfigError, match="too few"):
            lay_out_devices(blocks, shares)
        return
    found = lay_out_devices(blocks, shares)
    assert len(found) == blocks
    assert found == sorted(found)
    assert set(found) == set(range(len(shares)))
    if len(set(shares)) == 1:
        counts = [found.count(device) for device in range(len(shares))]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_device_map_names_every_weight_once(kind: str) -> None:
    decoder = (
        llama().decoder
        if kind == "llama"
        else GPT2Model(GPT2Config(n_embd=D, n_layer=4, n_head=4, vocab_size=V, n_positions=16))
    )
    first, last = torch.device("cuda:0"), torch.device("cuda:1")
    found = block_devices(decoder, [first, last], [1, 1])
    for name, _ in (*decoder.named_parameters(), *decoder.named_buffers()):
        assert sum(name == place or name.startswith(place + ".") for place in found) == 1, name
    layers, table, norm = ("layers", "embed_tokens", "norm") if kind == "llama" else ("h", "wte", "ln_f")
    assert [found[f"{layers}.{i}"] for i in range(4)] == [first, first, last, last]
    assert (found[table], found[norm]) == (first, last)


def test_a_spread_model_computes_the_same_bits() -> None:
    plain, part = llama(), copy.deepcopy(llama())
    cpu = torch.device("cpu")
    other = LocalLLM(spread(part, [cpu, cpu], [1, 1]))
    assert hasattr(part.decoder.layers[3], "_hf_hook")  # type: ignore[index]
    batch = torch.randn(3, 9, D), torch.ones(3, 9, dtype=torch.bool), torch.randint(V, (3, 9))
    found = []
    for llm in (LocalLLM(plain), other):
        x = batch[0].clone().requires_grad_()
        losses = llm.loss(x, *batch[1:])
        losses.sum().backward()
        tokens = llm.generate(batch[0], batch[1], 4)
        found.append((losses.detach(), x.grad, tokens))
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine, its)  # type: ignore[arg-type]
    again = other.passes._one(Part(slice(0, 3), 4), *batch, "cross_entropy", True)[1]
    assert again is not None
    assert torch.equal(again, found[0][1])  # type: ignore[arg-type]


def test_a_model_that_was_at_work_before_can_be_spread() -> None:
    """Its blocks have stood behind checkpoints; behind hooks these would be computed again inside of themselves."""
    part, cpu = llama(), torch.device("cpu")
    batch = torch.randn(2, 9, D), torch.ones(2, 9, dtype=torch.bool), torch.randint(V, (2, 9))

    def gradient(llm: LocalLLM) -> torch.Tensor:
        found = llm.passes._one(Part(slice(0, 2), 4), *batch, "cross_entropy", True)[1]
        assert found is not None
        return found

    before = gradient(LocalLLM(part))
    assert torch.equal(gradient(LocalLLM(spread(part, [cpu, cpu], [1, 1]))), before)
    # On GPUs, whose backward passes run on other threads, an inner checkpoint does not match itself.
    for layer in part.decoder.layers:  # type: ignore[union-attr]
        assert not isinstance(layer._old_forward, _Forward), "hooks stand before a checkpoint"


@pytest.mark.parametrize(
    ("text", "says"),
    [("auto", "torch sees no GPU"), ("cuda:7", "torch sees"), ("over there", "expected 'auto', 'balanced'")],
)
def test_a_bad_device_map_is_told(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=says):
        parse_device_map(text)


def test_what_cannot_be_spread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ModelError, match="no repeated blocks"):
        block_devices(nn.Linear(2, 2), [cpu, cpu], [1, 1])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"fednano\[multi-gpu\]"):
        spread(llama(), [cpu, cpu], [1, 1])


def test_options_that_exclude_each_other_are_told() -> None:
    options = Namespace(
        device_map="cpu,cpu", device="cpu", compile=True, model="m", dtype="float32", weights=""
    )
    with pytest.raises(ConfigError, match="--compile goes with one device"):
        load_part(options, lambda *_: llama())
    options = Namespace(
        device_map="cpu,cpu", device="cuda", compile=False, model="m", dtype="float32", weights=""
    )
    with pytest.raises(ConfigError, match="exclude each other"):
        load_part(options, lambda *_: llama())
