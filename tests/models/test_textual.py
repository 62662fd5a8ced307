"""Text-only models of every real class: divided, they are the undivided model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    Cohere2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from fednano.adapters import create
from fednano.errors import ConfigError, ModelError
from fednano.models.edge import NanoEdge
from fednano.models.files import find_model
from fednano.models.language import LocalLLM
from fednano.models.load import count_parameters, load_edge, load_language, load_whole
from fednano.models.prompt import Prompt
from fednano.models.textual import text_class

SIZES: dict[str, Any] = {
    "vocab_size": 150,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 150, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
KINDS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(sliding_window=5, **SIZES),
    "qwen2": Qwen2Config(tie_word_embeddings=True, **SIZES),
    "qwen3": Qwen3Config(head_dim=8, **SIZES),
    "phi": PhiConfig(**(SIZES | {"num_attention_heads": 2})),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(bos_token_id=1, eos_token_id=2, initializer_range=0.1, **GPT2),
    "gemma3": Gemma3TextConfig(head_dim=8, sliding_window=5, **SIZES),
}


def saved(config: Any, folder: Path) -> Path:
    """Random weights in a folder, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    text_class(config)(config).save_pretrained(folder, max_shard_size="20KB")
    for file in find_model("tiny").folder.iterdir():
        if "token" in file.name and not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(KINDS[request.param], tmp_path_factory.mktemp(request.param))


def test_losses_and_adapter_gradients_are_those_of_the_whole_model(folder: Path) -> None:
    whole = load_whole(str(folder)).double()
    edge = load_edge(str(folder), dtype=torch.float64)
    llm = LocalLLM(load_language(str(folder), dtype=torch.float64))
    nano = NanoEdge(edge, {"text": create("nano", rank=3, act="gelu")}, seed=0).double()
    with torch.no_grad():
        for parameter in nano.layers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    g = torch.Generator().manual_seed(2)
    prompts = [
        Prompt(tuple(torch.randint(5, 150, (n,), generator=g).tolist()), (7, 9, 2)[: 1 + n % 3])
        for n in (4, 9, 6)
    ]
    batch = nano(prompts, [None] * 3)
    losses = llm.loss(batch.embeds, batch.mask, batch.labels)
    losses.sum().backward()
    leaves = [p for p in nano.parameters() if p.requires_grad]
    got = [p.grad.clone() for p in leaves if p.grad is not None]
    assert len(got) == len(leaves)

    expected = []
    for prompt in prompts:
        ids = torch.tensor(prompt.ids + prompt.answer)
        rows = nano.layer("text")(whole.get_input_embeddings()(ids))
        logits = whole(inputs_embeds=rows[None], use_cache=False).logits[0]
        start = len(prompt.ids)
        expected.append(torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:]))
    torch.testing.assert_close(losses.detach(), torch.stack(expected).detach(), rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(got, torch.autograd.grad(sum(expected), leaves), strict=True):  # type: ignore[arg-type]
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6  # some rotate in float32


def test_answers_are_those_of_the_whole_model(folder: Path) -> None:
    whole, llm = load_whole(str(folder)), LocalLLM(load_language(str(folder)))
    edge = load_edge(str(folder))
    ids = torch.tensor([[7, 30, 55, 20, 9]])
    want = whole.generate(ids, max_new_tokens=5, do_sample=False)[0, 5:].tolist()
    got = llm.generate(edge.embed(ids).float(), torch.ones(1, 5, dtype=torch.bool), 5)[0].tolist()
    assert got[: len(want)] == want


def test_the_edge_holds_the_token_table_alone(folder: Path) -> None:
    edge, counted = load_edge(str(folder)), count_parameters(str(folder))
    assert sum(p.numel() for p in edge.parameters()) == counted["edge"] == 150 * 24
    assert counted["model"] == sum(p.numel() for p in load_whole(str(folder)).parameters())
    with pytest.raises(ModelError, match="the model is text-only, but the data has images"):
        edge.preprocess([])
    with pytest.raises(ConfigError, match="text-only and has no stream 'image'; set streams to 'text'"):
        NanoEdge(edge, {"image": create("nano", rank=2)}, seed=0)


def test_what_cannot_be_divided_is_told(tmp_path: Path) -> None:
    capped = Cohere2Config(logit_scale=0.5, **SIZES)
    with pytest.raises(ModelError, match="its logits are not its head's of its hidden states"):
        load_language(str(saved(capped, tmp_path / "cohere")))
    seeing = BertConfig(
        **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "bos_token_id")}
    )
    with pytest.raises(ModelError, match=r"cannot be divided|not causal"):
        load_language(str(saved(seeing, tmp_path / "bert")))
