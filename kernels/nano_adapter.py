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

from ._dispatch import (
    KernelArgumentError,
    as_rows,
    check_activation,
    check_tensor,
    is_traced,
    require,
    runs_triton,
)

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
    if x.dim() < 1 or x.numel() < 1:
        raise KernelArgumentError(
            f"x has shape {tuple(x.shape)}; expected (..., d), at least one row and one column"
        )
    d = x.shape[-1]
    check_tensor("a", a, shape=(d, None), like=x)
    require(a.shape[1] >= 1, "a has rank 0; an adapter needs rank 1 at least")
    check_tensor("b", b, shape=(a.shape[1], d), like=x)
    check_activation(activation)


_checked: set[tuple[object, ...]] = set()  # what was found good; looking is cheaper than checking again


def _forward(x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    """``(M, d)`` in, ``(M, d)`` and the pre-activation ``(M, r)`` out."""
    from . import _shrink_expand_triton as se

    z = x.new_empty(x.shape[0], a.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mode = se.GELU if activation == "gelu" else se.LINEAR
    se.launch(x, a, b, mode=mode, scale=scale, residual=True, saved=z, mid=z, act=z, out=y)
    return y, z


def _gradients(
    dy: Tensor, x: Tensor, z: Tensor, a: Tensor, b: Tensor, scale: float, activation: str,
    need_x: bool, need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients to x, A and B, None where not needed."""
    from . import _shrink_expand_triton as se
    from . import _weight_grad_triton as wg

    gelu = activation == "gelu"
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if gelu else z
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    mode = se.GELU_BACKWARD if gelu else se.LINEAR_BACKWARD
    se.launch(dy, b.T, a.T, mode=mode, scale=scale, residual=True, saved=z, mid=dz, act=h, out=dx)
    if not need_weights:
        return dx, None, None
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    db = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    wg.gradients(wg.Product(x, dz, da), wg.Product(dy, h, db.T, scale))
    return dx, da, db


@torch.library.custom_op("fednano::nano_adapter", mutates_args=())
def _forward_op(x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    return _forward(x, a, b, scale, activation)


@_forward_op.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], a.shape[1])


@torch.library.custom_op("fednano::nano_adapter_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, z: Tensor, a: Tensor, b: Tensor, scale: float, activation: str,
    need_x: bool, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """An empty tensor stands for a gradient that is not needed."""
    found = _gradients(dy, x, z, a, b, scale, activation, need_x, need_weights)
    dx, da, db = (x.new_empty(0) if f is None else f for f in found)
    return dx, da, db


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


def _op_backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, a, b = ctx.saved_tensors
    need_x, need_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, da, db = _backward_op(as_rows(dy), x, z, a, b, ctx.scale, ctx.activation, need_x, need_weights)
    return (dx if need_x else None, *((da, db) if need_weights else (None, None)), None, None)


_forward_op.register_autograd(_op_backward, setup_context=_setup)


class _Function(torch.autograd.Function):
    """The same pair without the dispatcher's overhead, for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, activation: str) -> Tensor:
        y, z = _forward(x, a, b, scale, activation)
        ctx.save_for_backward(x, z, a, b)
        ctx.scale, ctx.activation = scale, activation
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        found = _gradients(
            as_rows(grads[0]), x, z, a, b, ctx.scale, ctx.activation, needs[0], needs[1] or needs[2]
        )
        return (*found, None, None)


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
    known = (x.shape, a.shape, b.shape, x.dtype, a.dtype, b.dtype, x.device, a.device, b.device, activation)
    if known not in _checked:
        _check(x, a, b, activation)
        if len(_checked) >= 4096:
            _checked.clear()
        _checked.add(known)
    if not runs_triton(x):
        return nano_adapter_reference(x, a, b, scale, activation)
    if is_traced(x):
        y = _forward_op(as_rows(x), a, b, float(scale), activation)[0]
    else:
        y = _Function.apply(as_rows(x), a, b, float(scale), activation)  # type: ignore[no-untyped-call]
    result: Tensor = y.view(x.shape)
    return result
