"""The tiny model: Hugging Face's own LLaVA classes at a size that trains on a laptop."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from pretraining.vocabulary import IMAGE_SIZE, MAX_TOKENS, PATCH_SIZE, WORDS, build_processor

__all__ = ["build_config", "build_model", "save"]


def build_config() -> LlavaConfig:
    """LLaVA-1.5's layout (CLIP tower, two-layer connector, Llama decoder) with 16 image tokens."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=192,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS.index("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype="float32",
        **ids,
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """An untrained model whose connector output and token embeddings start at unit scale.

    Adapters sit on those two streams; at unit scale one learning rate suits both.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config())
    decoder = model.model.language_model
    depth = 2 * len(decoder.layers)
    with torch.no_grad():
        for name, module in decoder.named_modules():
            if isinstance(module, nn.Linear):
                # What is added to the residual stream starts small: there are `depth` such additions.
                shrink = math.sqrt(depth) if name.endswith(("o_proj", "down_proj")) else 1.0
                module.weight.normal_(0.0, module.in_features**-0.5 / shrink)
        for module in model.model.multi_modal_projector.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 1.4 * module.in_features**-0.5)
                module.bias.zero_()
        decoder.embed_tokens.weight.normal_(0.0, 1.0)
        decoder.embed_tokens.weight[0].zero_()
        model.lm_head.weight.normal_(0.0, 0.02)
    return model


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model, processor and prompt format into ``folder``; the weights are stored in half precision.

    ``config.json`` says float32: Hugging Face then widens the stored float16 numbers when it loads them, so that the
    file stays small and the arithmetic stays exact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, do_sample=False, max_new_tokens=4
    ).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    weights = folder / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
