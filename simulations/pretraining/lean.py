"""Faster forms of three layers, for training in bfloat16 on a CPU; same parameters, same mathematics.

Hugging Face's layers are written for accelerators: on a CPU the backward pass of the patch convolution, of the
attention (with its float32 copies) and of RMSNorm cost more than the matrix products around them. While
:func:`lean` is in force, a model uses the forms below; afterwards it is the plain Hugging Face model again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

__all__ = ["keep_memory", "lean"]


class _PatchProjection(nn.Module):
    """The tower's patch convolution as one matrix product over the same weight ``(d, 3, P, P)``."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight

    def forward(self, pixels: Tensor) -> Tensor:
        """Patches ``(N, d, H/P, W/P)`` of pixels ``(N, 3, H, W)``."""
        n, channels, height, width = pixels.shape
        side = self.weight.shape[-1]
        rows, columns = height // side, width // side
        blocks = pixels.view(n, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        out = F.linear(blocks.reshape(n, rows * columns, -1), self.weight.flatten(1))
        return out.transpose(1, 2).reshape(n, -1, rows, columns)


class _Normalise(torch.autograd.Function):
    """``y = w x / rms(x)`` with a backward pass of few, wide operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``(..., d)`` and ``(d,)`` to ``(..., d)``."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm * norm / x.shape[-1] + eps).to(x.dtype)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of ``x`` and ``weight``: ``dx = (g - u mean(g u)) / rms`` with ``g = w dy`` and ``u = x / rms``."""
        unit, inverse, weight = ctx.saved_tensors
        product = grad * unit
        slope = (product @ weight[:, None]) / unit.shape[-1]
        d_x = torch.addcmul(grad * weight, unit, slope, value=-1.0).mul_(inverse)
        return d_x, product.flatten(0, -2).sum(0), None


class _Norm(nn.Module):
    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Normalise.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over ``(N, heads, T, d)`` in the inputs' own type; returns ``(N, T, heads, d)``."""
    scores = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
    return torch.matmul(scores.softmax(-1), value).transpose(1, 2).contiguous(), None


AttentionInterface.register("fednano_lean", _attention)


def _swap(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put the fast forms in; returns what stood where."""
    swapped = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fast: nn.Module
            if isinstance(child, LlamaRMSNorm):
                fast = _Norm(child)
            elif isinstance(child, nn.Conv2d):
                fast = _PatchProjection(child)
            else:
                continue
            swapped.append((parent, name, child))
            setattr(parent, name, fast)
    return swapped


@contextmanager
def lean(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Use the fast forms in ``model`` within the block."""
    before = model.config._attn_implementation
    swapped = _swap(model)
    model.set_attn_implementation("fednano_lean")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for parent, name, child in swapped:
            setattr(parent, name, child)


def keep_memory() -> None:
    """Ask the C library to keep freed memory instead of giving it back; for a process that does nothing but train.

    Tensors of a few MB are otherwise mapped anew, page by page, at every operation: that is half of a step's time.
    Only glibc understands; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
