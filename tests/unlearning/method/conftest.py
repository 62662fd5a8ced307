"""A tiny random LLaVA in this process, a text set, and tuned adapters away from their start."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fednano.adapters import create
from fednano.data import Sample
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LocalLLM
from fednano.models.load import split_model
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

WORDS = ["red", "circle", "square blue", "yes", "no", "green triangle", "is there", "what color"]


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
    torch.manual_seed(7)
    edge, language = split_model(LlavaForConditionalGeneration(config), "tiny")
    return edge, LocalLLM(language)


@pytest.fixture(scope="session")
def texts() -> list[Sample]:
    return [
        Sample(id=str(i), image=None, question=f"{WORDS[i % 8]} {WORDS[i % 3]}?", answer=WORDS[(3 * i) % 8])
        for i in range(12)
    ]


Tuned = Callable[..., NanoEdge]


@pytest.fixture
def tuned(parts: tuple[EdgePart, LocalLLM]) -> Tuned:
    """Makes a NanoEdge whose adapters have moved, as if tuned."""

    def make(kind: str = "nano", **options: object) -> NanoEdge:
        adapters = {"image": create(kind, **options), "text": create(kind, **options)}
        nano = NanoEdge(parts[0], adapters, seed=0)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for leaf in nano.layers.parameters():
                leaf.copy_(0.3 * torch.randn(leaf.shape, generator=generator))
        return nano

    return make


@pytest.fixture
def data(tuned: Tuned, parts: tuple[EdgePart, LocalLLM], texts: list[Sample]) -> ClientData:
    return ClientData(texts, tuned(rank=2), FeatureCache(parts[0]))
