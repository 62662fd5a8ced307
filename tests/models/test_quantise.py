"""Weights in 8 and 4 bits: what they cost in accuracy, what they save, and that gradients reach the embeddings."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from fednano.errors import ConfigError, ModelError
from fednano.host.loading import load_part
from fednano.models.language import LanguagePart, LocalLLM
from fednano.models.quantise import quantise

D, V, CPU = 128, 60, torch.device("cpu")


def part() -> LanguagePart:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        attention_bias=True,
    )
    return LanguagePart(LlamaModel(config).eval(), nn.Linear(D, V, bias=False), D, V, 64, (2,), 0, "full")


def step(llm: LocalLLM) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(3, 12, D, generator=draw).requires_grad_()
    losses = llm.loss(x, torch.ones(3, 12, dtype=torch.bool), torch.randint(V, (3, 12), generator=draw))
    losses.sum().backward()
    assert x.grad is not None
    return losses.detach(), x.grad


@pytest.mark.parametrize(("weights", "bits", "worst"), [("int8", 8, 0.06), ("int4", 4, 0.5)])
def test_losses_and_gradients_are_near_those_of_full_weights(weights: str, bits: int, worst: float) -> None:
    pytest.importorskip("bitsandbytes")
    full = part()
    less = quantise(copy.deepcopy(full), weights, CPU)
    assert less.fingerprint != full.fingerprint
    blocks = list(less.decoder.layers)  # type: ignore[union-attr]
    matrices = [w for block in blocks for name, w in block.named_parameters() if name.endswith("proj.weight")]
    whole = [w for name, w in full.decoder.named_parameters() if name.endswith("proj.weight")]
    assert len(matrices) == len(whole) == 14
    assert sum(w.nbytes for w in matrices) * 8 == sum(w.numel() for w in whole) * bits
    (losses, gradient), (want, its) = step(LocalLLM(less)), step(LocalLLM(full))
    torch.testing.assert_close(losses, want, rtol=worst, atol=worst)
    error = float((gradient - its).norm() / its.norm())
    assert 1e-4 < error < worst
    assert all(weight.grad is None for weight in less.decoder.parameters())
    tokens = LocalLLM(less).generate(torch.randn(1, 4, D), torch.ones(1, 4, dtype=torch.bool), 3)
    assert tokens.shape == (1, 3)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'fednano\[quantised\]'"):
        quantise(part(), "int4", CPU)


def test_a_model_without_linear_layers_is_told() -> None:
    pytest.importorskip("bitsandbytes")
    decoder = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=V, n_positions=8))
    other = LanguagePart(decoder, nn.Linear(8, V), 8, V, 8, (2,), 0, "gpt2")
    with pytest.raises(ModelError, match="no linear layers"):
        quantise(other, "int8", CPU)


def test_the_hosts_options_choose_them() -> None:
    asked: list[str] = []

    def load(_name: str, dtype: str, _device: str) -> LanguagePart:
        asked.append(dtype)
        return part()

    def options(**changes: Any) -> Namespace:
        given = {"weights": "", "dtype": "float32", "device": "cpu", "device_map": "", "compile": False}
        return Namespace(model="m", **{**given, **changes})

    load_part(options(weights="bf16"), load)
    load_part(options(), load)
    assert asked == ["bfloat16", "float32"]
    with pytest.raises(ConfigError, match="exclude each other"):
        load_part(options(weights="bf16", dtype="float16"), load)
    with pytest.raises(ConfigError, match="--weights int4 goes with one device"):
        load_part(options(weights="int4", device_map="cpu,cpu"), load)
    pytest.importorskip("bitsandbytes")
    assert load_part(options(weights="int8"), load).fingerprint != "full"
