"""``y = x + s·act(x A) B``: the NanoAdapter of FedNano (arXiv 2506.14824), fused.

Eager torch makes about seven passes over an activation of ``(M, d)``, forward; the fused forward makes two (read x,
write y) and keeps only ``z = x A`` ``(M, r)`` for the backward, which makes four (read dy twice, read x, write dx).
With r far below d the operator is limited by memory bandwidth, so passes are what counts.

Backward, with ``h = act(z)``::

    dh = s dy Bᵀ        dz = dh · act'(z)
    dx = dy + dz Aᵀ     dA = xᵀ dz     dB = s hᵀ dy
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import as_rows, check_activation, check_tensor, require, runs_triton

__all__ = ["nano_adapter", "nano_adapter_reference"]


def nano_adapter_reference(x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> Tensor:
    """The same in plain torch, differentiable any number of times.

    Args:
        x: ``(..., d)``.
        a: ``(d, r)``.
        b: ``(r, d)``.
        scale: s.
        activation: ``"linear"`` or ``"gelu"`` (the exact one, with erf).

    Returns:
        ``(..., d)``.
    """
    z = x @ a
    h = F.gelu(z) if activation == "gelu" else z
    return x + scale * (h @ b)


def _check(x: Tensor, a: Tensor, b: Tensor, activation: str) -> None:
    check_tensor("x", x)
    require(x.dim() >= 1, f"x has shape {tuple(x.shape)}; expected (..., d)")
    d = x.shape[-1]
    check_tensor("a", a, shape=(d, None), like=x)
    require(a.shape[1] >= 1, "a has rank 0; an adapter needs rank 1 at least")
    check_tensor("b", b, shape=(a.shape[1], d), like=x)
    check_activation(activation)
    require(
        d >= 1 and x.numel() >= 1, f"x has shape {tuple(x.shape)}; expected at least one row and one column"
    )


def _split(x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """The reference, which also returns the pre-activation."""
    z = x @ a
    h = F.gelu(z) if activation == "gelu" else z
    return x + scale * (h @ b), z


@torch.library.custom_op("fednano::nano_adapter", mutates_args=())
def _forward_op(x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """``(M, d)`` in, ``(M, d)`` and the pre-activation ``(M, r)`` out."""
    if not runs_triton(x):
        return _split(x, a, b, scale, activation)
    from . import _shrink_expand_triton as se

    z = x.new_empty(x.shape[0], a.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mode = se.GELU if activation == "gelu" else se.LINEAR
    se.launch(x, a, b, mode=mode, scale=scale, residual=True, saved=z, mid=z, act=z, out=y)
    return y, z


@_forward_op.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], a.shape[1])


@torch.library.custom_op("fednano::nano_adapter_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, z: Tensor, a: Tensor, b: Tensor, scale: float, activation: str,
    need_x: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, A and B; an empty tensor stands for one that is not needed."""
    none = x.new_empty(0)
    gelu = activation == "gelu"
    if not runs_triton(x):
        h = F.gelu(z) if gelu else z
        dz = scale * (dy @ b.T)
        if gelu:
            dz = torch.ops.aten.gelu_backward(dz, z)
        return (
            dy + dz @ a.T if need_x else none,
            x.T @ dz if need_weights else none,
            scale * (h.T @ dy) if need_weights else none,
        )
    from . import _shrink_expand_triton as se
    from . import _weight_grad_triton as wg

    dz = torch.empty_like(z)
    h = torch.empty_like(z) if gelu else z
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    mode = se.GELU_BACKWARD if gelu else se.LINEAR_BACKWARD
    se.launch(dy, b.T, a.T, mode=mode, scale=scale, residual=True, saved=z, mid=dz, act=h, out=dx)
    da, db = none, none.clone()
    if need_weights:
        da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        db = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        wg.gradients(wg.Product(x, dz, da), wg.Product(dy, h, db.T, scale))
    return dx if dx is not None else none.clone(), da, db


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, z: Tensor, a: Tensor, b: Tensor, scale: float, activation: str,
    need_x: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        a.new_empty(a.shape) if need_weights else x.new_empty(0),
        b.new_empty(b.shape) if need_weights else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, b, ctx.scale, ctx.activation = inputs
    ctx.save_for_backward(x, output[1], a, b)


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, a, b = ctx.saved_tensors
    need_x, need_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, da, db = _backward_op(as_rows(dy), x, z, a, b, ctx.scale, ctx.activation, need_x, need_weights)
    return (dx if need_x else None, *((da, db) if need_weights else (None, None)), None, None)


_forward_op.register_autograd(_backward, setup_context=_setup)


def nano_adapter(x: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, activation: str = "linear") -> Tensor:
    """``x + scale · act(x A) B``, differentiable once in x, A and B.

    On CUDA this is one Triton kernel forward, and two or three backward; elsewhere it is ``nano_adapter_reference``.

    Args:
        x: ``(..., d)``, float32, bfloat16 or float16; any strides, rows with unit stride are not copied.
        a: ``(d, r)``, dtype and device of x.
        b: ``(r, d)``, dtype and device of x.
        scale: s.
        activation: ``"linear"`` or ``"gelu"`` (the exact one, with erf).

    Returns:
        ``(..., d)``, contiguous on CUDA.

    Raises:
        KernelArgumentError: device, dtype or shape do not fit, or the rank is 0, or x is empty.
    """
    _check(x, a, b, activation)
    if not runs_triton(x):
        return nano_adapter_reference(x, a, b, scale, activation)
    y, _ = _forward_op(as_rows(x), a, b, float(scale), activation)
    result: Tensor = y.view(x.shape)
    return result
