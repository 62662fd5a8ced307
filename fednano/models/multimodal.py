"""Multimodal models: where their two sides are, read off the model itself.

The language side is the decoder that the model names and its output head; all else is the vision side, which the
model's own ``get_image_features`` runs. What the decoder makes of images is read off its positions and masks. Models
that pass more than embeddings, positions and masks between the two sides are refused: a host would leave it out.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fednano.errors import ModelError
from fednano.models.build import without_layers
from fednano.models.images import ImageUse, MaskMaker

__all__ = [
    "FAMILIES",
    "Sides",
    "bare",
    "image_use",
    "is_multimodal",
    "multimodal_class",
    "sides_of",
    "without_side",
]

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "gemma3")
"""Values of ``model_type`` whose halves are tested against the whole model."""

_DECODER_TAKES = {
    "self",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "cache_position",
    "kwargs",
}


@dataclass(frozen=True)
class Sides:
    """A model's parts.

    Attributes:
        inner: the model without its head; has ``get_image_features``.
        decoder: its language model.
        head: maps hidden states to logits.
        vision: names of the children of ``inner`` that are the vision side.
    """

    inner: Any
    decoder: Any
    head: nn.Linear
    vision: tuple[str, ...]


def is_multimodal(config: Any) -> bool:
    """Whether a configuration is that of a family that can be divided."""
    return getattr(config, "model_type", "") in FAMILIES


def multimodal_class(config: Any) -> Any:
    """transformers' class of a multimodal model."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def sides_of(model: Any) -> Sides:
    """Divide a model of any device, ``meta`` included.

    Raises:
        ModelError: its parts are not where they would have to be.
    """
    kind = type(model).__name__
    inner, decoder, head = model.base_model, model.get_decoder(), model.get_output_embeddings()
    children = dict(inner.named_children()) if inner is not model else {}
    if decoder not in children.values() or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{kind} cannot be divided: expected a model with a decoder of its own beside the vision side, and a "
            "linear head."
        )
    if not hasattr(inner, "get_image_features"):
        raise ModelError(f"{kind} cannot be divided: its vision side has no get_image_features.")
    more = set(inspect.signature(inspect.unwrap(type(decoder).forward)).parameters) - _DECODER_TAKES
    if more:
        raise ModelError(
            f"{kind} cannot be divided: its decoder takes {', '.join(sorted(more))} beside embeddings, and a host gets "
            "embeddings alone."
        )
    return Sides(
        inner, decoder, head, tuple(name for name, child in children.items() if child is not decoder)
    )


def without_side(config: Any, *, vision: bool) -> Any:
    """The configuration with the vision side's layers left out, or the decoder's; changed in place."""
    without_layers(config.vision_config if vision else config.text_config)
    return config


def image_use(model: Any) -> tuple[ImageUse, MaskMaker | None]:
    """What a model's decoder makes of images, and who makes its masks."""
    text = model.config.get_text_config()
    if "mrope_section" in (getattr(text, "rope_parameters", None) or {}) or hasattr(
        model.base_model, "get_rope_index"
    ):
        return ImageUse.GRID, None
    maker = getattr(type(model), "create_masks_for_generate", None)
    if maker is not None and "token_type_ids" in inspect.signature(maker).parameters:
        return ImageUse.BLOCK, partial(maker, model.config)
    return ImageUse.PLAIN, None


def bare(config: Any) -> Any:
    """The whole model without memory, to look at."""
    with torch.device("meta"):
        return multimodal_class(config)(config)
