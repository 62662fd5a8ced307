"""A model's identity: one hash over names, shapes, dtypes and bytes of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["fingerprint", "tensor_bytes"]


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Raw little-endian bytes of a tensor of any dtype, bf16 included."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """Hex SHA-256 over all parameters and persistent buffers of ``modules``, in name order."""
    digest = hashlib.sha256()
    for prefix in sorted(modules):
        for name, tensor in sorted(modules[prefix].state_dict().items()):
            digest.update(f"{prefix}.{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
