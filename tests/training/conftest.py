"""A tiny random LLaVA, split, with a language model here and one on a host in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fednano.adapters import create
from fednano.data import Sample
from fednano.host import RemoteLLM, serve
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LocalLLM
from fednano.models.load import split_model

QUESTIONS = [
    ("what color is the circle?", "red"),
    ("is there a square?", "no"),
    ("is it blue?", "yes"),
    ("what shape?", "circle"),
]


@pytest.fixture(scope="session")
def parts() -> tuple[EdgePart, LocalLLM]:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=32,
        ),
        text_config=LlamaConfig(
            vocab_size=200,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        ),
        image_token_index=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(5)
    edge, language = split_model(LlavaForConditionalGeneration(config), "tiny")
    return edge, LocalLLM(language)


@pytest.fixture(scope="session")
def remote(parts: tuple[EdgePart, LocalLLM]) -> Iterator[RemoteLLM]:
    with serve(parts[1], chunk_bytes=4096, grace=1.0) as host, RemoteLLM(host.address, insecure=True) as llm:
        yield llm


@pytest.fixture
def nano(parts: tuple[EdgePart, LocalLLM]) -> NanoEdge:
    return moved(
        NanoEdge(parts[0], {s: create("nano", rank=3, act="gelu") for s in ("image", "text")}, seed=0), 1
    )


def moved(edge: NanoEdge, seed: int) -> NanoEdge:
    """Away from the start, where B = 0 makes the gradient of A vanish."""
    with torch.no_grad():
        for name, leaf in edge.layers.named_parameters():
            number = int(hashlib.sha256(f"{name}{seed}".encode()).hexdigest()[:8], 16)
            leaf.copy_(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
    return edge


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    made = []
    for index in range(12):
        path: Path | None = folder / f"{index}.png"
        if index % 5 == 4:
            path = None  # a question without an image
        else:
            Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
                folder / f"{index}.png"
            )
        question, answer = QUESTIONS[index % len(QUESTIONS)]
        made.append(Sample(id=str(index), image=path, question=question, answer=answer))
    return made
