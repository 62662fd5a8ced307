"""The diagonal Fisher as 8 bits an element."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fednano.aggregation.codec import as_bytes, checked_scales
from fednano.aggregation.update import Leaves, Refusal
from fednano.errors import ConfigError

__all__ = ["decode_fisher", "encode_fisher"]


def encode_fisher(fisher: Mapping[str, Tensor]) -> Leaves:
    """A diagonal Fisher as 8 bits an element and one float32 scale per tensor.

    The code is ``round(255 sqrt(F / max))``: the roots are coded evenly, because a Fisher is a mean of squares
    and spans twice the orders of magnitude of the gradients behind it. The root is off by at most ``sqrt(max) /
    510``.

    Args:
        fisher: name to tensor, not negative.

    Returns:
        Name to ``uint8`` of ``4 + n`` bytes.

    Raises:
        ConfigError: negative or not finite.
    """
    out = {}
    for name, values in fisher.items():
        flat = values.detach().reshape(-1).double()
        top = float(flat.max()) if flat.numel() else 0.0
        if not math.isfinite(float(flat.sum())) or (flat.numel() and float(flat.min()) < 0.0):
            raise ConfigError(f"the Fisher of {name} is negative or not finite; it is a mean of squares")
        scale = np.float32(min(top, float(np.finfo(np.float32).max)))
        ratio = flat / float(scale) if scale > 0.0 else flat * 0.0
        codes = (ratio.clamp(0.0, 1.0).sqrt() * 255.0).round().to(torch.uint8)
        out[name] = torch.cat([torch.from_numpy(as_bytes(np.array([scale], np.float32)).copy()), codes])
    return out


def decode_fisher(payloads: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Leaves:
    """The Fisher that payloads stand for, float32.

    Args:
        payloads: name to ``uint8``, 1-D.
        shapes: name to the shape of the leaf.

    Raises:
        Refusal: "codec" when a payload has a wrong dtype, length or scale; "schema" for an unknown leaf.
    """
    out = {}
    for name, payload in payloads.items():
        if name not in shapes:
            raise Refusal("schema", f"unknown leaf {name}")
        size = math.prod(shapes[name])
        if payload.dtype != torch.uint8 or payload.ndim != 1 or payload.numel() != size + 4:
            raise Refusal(
                "codec",
                f"Fisher of {name} is {payload.dtype} {tuple(payload.shape)}, expected {size + 4} bytes",
            )
        scale = float(checked_scales(payload[:4].contiguous().numpy().copy().view(np.float32))[0])
        root = payload[4:].float() / 255.0
        out[name] = (root * root * scale).reshape(shapes[name])
    return out
