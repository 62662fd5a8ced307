"""Weights of a frozen decoder in 8 or 4 bits, by bitsandbytes; gradients still reach the embeddings.

``int8`` is LLM.int8() (arXiv:2208.07339): rows of weights and of activations as bytes, columns with outliers apart.
``int4`` is NF4 (QLoRA, arXiv:2305.14314): weights in blocks of 64 on a grid for normal numbers, made whole again for
each product. Only the linear layers inside the decoder's blocks are changed; embeddings, norms and head stay.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fednano.errors import ConfigError, ModelError
from fednano.models.blocks import repeated_blocks
from fednano.models.language import LanguagePart

__all__ = ["QUANTISED", "quantise"]

QUANTISED = ("int8", "int4")
_OUTLIERS = 6.0
"""Activations beyond it are multiplied in full precision, as the paper of LLM.int8() found right."""


def quantise(part: LanguagePart, weights: str, device: torch.device) -> LanguagePart:
    """Change a part's linear layers and move it to a device.

    Args:
        part: with full weights, which need not be on the device; its modules are changed in place.
        weights: ``"int8"`` or ``"int4"``.
        device: where to.

    Returns:
        The part under another fingerprint: it gives other losses.

    Raises:
        ConfigError: bitsandbytes is not installed.
        ModelError: the decoder has no linear layers in its blocks.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ConfigError(
            f"weights in {weights} need the package bitsandbytes: pip install 'fednano[quantised]'"
        ) from error
    found = [
        (parent, name, child)
        for block in repeated_blocks(part.decoder)
        for parent in block.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    if not found:
        raise ModelError(
            f"{type(part.decoder).__name__} has no linear layers in its blocks whose weights could be {weights}"
        )
    for parent, name, full in found:
        setattr(parent, name, _layer(bnb, full, weights, device))
    part.decoder.to(device)
    part.head.to(device)
    other = hashlib.sha256(f"{part.fingerprint}:{weights}".encode()).hexdigest()
    return replace(part, fingerprint=other)


def _layer(bnb: Any, full: nn.Linear, weights: str, device: torch.device) -> nn.Module:
    sizes, bias = (full.in_features, full.out_features), full.bias is not None
    made: nn.Module
    if weights == "int8":
        made = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=_OUTLIERS)
        made.weight = bnb.nn.Int8Params(full.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*sizes, bias=bias, quant_type="nf4", compute_dtype=full.weight.dtype)
        made.weight = bnb.nn.Params4bit(full.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = full.bias
    return made.to(device)  # that is when it is quantised
