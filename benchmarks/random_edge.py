"""A client's part of LLaVA with random weights, for benchmarks: no tokenizer, no image processor, no decoder."""

from __future__ import annotations

from typing import Any

from fednano.models.edge import EdgePart
from fednano.models.prompt import ImagePlace
from fednano.models.vision import Vision


def random_edge(vision: dict[str, Any], width: int, vocabulary: int, image_token: int = 1) -> EdgePart:
    """Encoder, connector and token embeddings on torch's default device.

    Args:
        vision: for ``CLIPVisionConfig``.
        width: d.
        vocabulary: number of token ids.
        image_token: id that stands for an image in a prompt.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

    text = LlamaConfig(hidden_size=width, vocab_size=vocabulary, num_hidden_layers=0, num_attention_heads=1)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=text, vision_feature_layer=-2)
    inner = LlavaModel(config).eval()
    return EdgePart(
        vision=Vision(inner, inner.language_model, None),
        token_embedding=inner.get_input_embeddings(),
        tokenizer=None,
        place=ImagePlace(image_token, "", ""),
        hidden_size=width,
        fingerprint="random",
    )
