"""Tiny random models of each multimodal family, saved as a checkpoint would be: weights, tokenizer, image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Idefics3Config,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    SmolVLMConfig,
)

from fednano.models.files import find_model
from fednano.models.multimodal import multimodal_class

KINDS = ("qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "gemma3")
D, V = 32, 220
TEXT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEWLINES = ["\n", "\n\n", "\n\n\n"]
MARKS = {
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "idefics3": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    + [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
}
MARKS["qwen2_5_vl"], MARKS["smolvlm"] = MARKS["qwen2_vl"], MARKS["idefics3"]
SHOWN = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "gemma3": "<start_of_image>",
}
SHOWN["qwen2_5_vl"], SHOWN["smolvlm"] = SHOWN["qwen2_vl"], SHOWN["idefics3"]


def tokenizer_of(kind: str) -> Any:
    """The embedded model's words, with the family's own marks and a chat template that uses them."""
    tokenizer = AutoTokenizer.from_pretrained(str(find_model("tiny").folder))
    tokenizer.add_special_tokens({"additional_special_tokens": [*NEWLINES, *MARKS[kind]]})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}" + SHOWN[kind] + "{% else %}"
        "question : {{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}\n answer :"
    )
    return tokenizer


def config_of(kind: str, tokenizer: Any) -> Any:
    """The family's configuration, as small as it goes."""
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in (*MARKS[kind], "<image>")}
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        marks = {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
        text = {**TEXT, "rope_parameters": rope}
        if kind == "qwen2_vl":
            vision: dict[str, Any] = {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": D,
                "num_heads": 2,
                "mlp_ratio": 2,
            }
            return Qwen2VLConfig(text_config=text, vision_config={**vision, "patch_size": 4}, **marks)
        vision = {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": D,
            "num_heads": 2,
            "intermediate_size": 48,
        }
        more = {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config={**vision, **more}, **marks)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gemma3":
        return Gemma3Config(
            text_config={
                **TEXT,
                "head_dim": 8,
                "sliding_window": 6,
                "query_pre_attn_scalar": 8,
                # One of each: with sliding layers alone nothing of an image would reach the answer.
                "layer_types": ["sliding_attention", "full_attention"],
            },
            vision_config={**tower, "image_size": 16, "patch_size": 4},
            mm_tokens_per_image=4,
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            image_token_index=ids["<image_soft_token>"],
        )
    cls = Idefics3Config if kind == "idefics3" else SmolVLMConfig
    return cls(
        text_config=LlamaConfig(**TEXT),
        vision_config={**tower, "image_size": 16, "patch_size": 4},
        scale_factor=2,
        image_token_id=ids["<image>"],
        pad_token_id=0,
    )


def processor_config(kind: str) -> dict[str, Any]:
    """What the family's image processor is told."""
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 4,
            "size": {"shortest_edge": 64, "longest_edge": 512},
        }
    if kind == "gemma3":
        return {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}}
    name = "Idefics3ImageProcessor" if kind == "idefics3" else "SmolVLMImageProcessor"
    return {
        "image_processor_type": name,
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
    }


def save(kind: str, folder: Path) -> Any:
    """Random weights in a folder; returns the whole model."""
    tokenizer = tokenizer_of(kind)
    torch.manual_seed(0)
    config = config_of(kind, tokenizer)
    model = multimodal_class(config)(config).eval()
    with torch.no_grad():  # some weights start as zeros, which would hide what they do
        for weight in model.parameters():
            if not bool(weight.any()):
                weight.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_config(kind)))
    return model
