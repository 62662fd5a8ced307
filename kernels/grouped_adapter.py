"""``nano_adapter`` for one batch that mixes many clients, each with its own A and B, ranks may differ.

The tokens are sorted by client; ``offsets`` says where each client's begin. A loop over the clients would launch, for
each of them, kernels too small for the card; padding the clients to one length would multiply the work. Here the blocks
of all clients are programs of one launch, which find their client by counting. The offsets are read on the device only.
Smaller ranks are padded to the largest: the padding is never read as numbers, and its gradient is exactly zero.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._dispatch import as_rows, check_activation, check_tensor, is_traced, require, runs_triton
from .nano_adapter import nano_adapter_reference

__all__ = ["grouped_adapter", "grouped_adapter_reference"]


def grouped_adapter_reference(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float,
    activation: str,
    ranks: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, client by client; arguments as in ``grouped_adapter``."""
    bounds = offsets.tolist()
    used = [a.shape[2]] * a.shape[0] if ranks is None else ranks.tolist()
    parts = [
        nano_adapter_reference(x[low:high], a[c, :, : used[c]], b[c, : used[c]], scale, activation)
        for c, (low, high) in enumerate(pairwise(bounds))
    ]
    return torch.cat(parts)


def _forward(
    x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ranks: Tensor | None, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    """``(M, d)`` and the pre-activations ``(M, R)``."""
    from . import _shrink_expand_triton as se

    z = x.new_empty(x.shape[0], a.shape[2])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mode = se.GELU if activation == "gelu" else se.LINEAR
    se.launch(
        x,
        a,
        b,
        mode=mode,
        scale=scale,
        residual=True,
        saved=z,
        mid=z,
        act=z,
        out=y,
        groups=se.Groups(offsets, ranks),
    )
    return y, z


def _gradients(
    dy: Tensor, x: Tensor, z: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ranks: Tensor | None,
    scale: float, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x ``(M, d)``, A ``(C, d, R)`` and B ``(C, R, d)``."""
    from . import _grouped_grad_triton as gg
    from . import _shrink_expand_triton as se
    from ._weight_grad_triton import Product

    gelu = activation == "gelu"
    dz = torch.empty_like(z)
    h = torch.empty_like(z) if gelu else z
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    se.launch(
        dy, b.transpose(1, 2), a.transpose(1, 2), mode=se.GELU_BACKWARD if gelu else se.LINEAR_BACKWARD, scale=scale,
        residual=True, saved=z, mid=dz, act=h, out=dx, groups=se.Groups(offsets, ranks),
    )  # fmt: skip
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    db = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    gg.gradients_by_client(Product(x, dz, da), Product(dy, h, db.transpose(1, 2), scale), offsets)
    return dx, da, db


@torch.library.custom_op("fednano::grouped_adapter", mutates_args=())
def _forward_op(
    x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ranks: Tensor | None, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    return _forward(x, a, b, offsets, ranks, scale, activation)


@_forward_op.register_fake
def _(
    x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ranks: Tensor | None, scale: float, activation: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], a.shape[2])


@torch.library.custom_op("fednano::grouped_adapter_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, z: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ranks: Tensor | None,
    scale: float, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(dy, x, z, a, b, offsets, ranks, scale, activation)


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, z: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ranks: Tensor | None,
    scale: float, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        a.new_empty(a.shape),
        b.new_empty(b.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, b, offsets, ranks, ctx.scale, ctx.activation = inputs
    ctx.save_for_backward(x, output[1], a, b, offsets, ranks)


def _op_backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, a, b, offsets, ranks = ctx.saved_tensors
    return (*_backward_op(as_rows(dy), x, z, a, b, offsets, ranks, ctx.scale, ctx.activation), *(None,) * 4)


_forward_op.register_autograd(_op_backward, setup_context=_setup)


class _Function(torch.autograd.Function):
    """The same pair without the dispatcher's overhead, for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        offsets: Tensor,
        ranks: Tensor | None,
        scale: float,
        act: str,
    ) -> Tensor:
        y, z = _forward(x, a, b, offsets, ranks, scale, act)
        ctx.save_for_backward(x, z, a, b, offsets, ranks)
        ctx.scale, ctx.activation = scale, act
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, a, b, offsets, ranks = ctx.saved_tensors
        return (
            *_gradients(as_rows(grads[0]), x, z, a, b, offsets, ranks, ctx.scale, ctx.activation),
            *(None,) * 4,
        )


def _check(x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, ranks: Tensor | None, activation: str) -> None:
    check_tensor("x", x, shape=(None, None))
    d = x.shape[1]
    check_tensor("a", a, shape=(None, d, None), like=x)
    check_tensor("b", b, shape=(a.shape[0], a.shape[2], d), like=x)
    check_activation(activation)
    require(
        a.shape[2] >= 1 and a.shape[0] >= 1,
        f"a has shape {tuple(a.shape)}; expected a client and a rank at least",
    )
    require(x.numel() >= 1, f"x has shape {tuple(x.shape)}; expected at least one row and one column")
    for name, tensor, length in (("offsets", offsets, a.shape[0] + 1), ("ranks", ranks, a.shape[0])):
        require(
            tensor is None
            or (
                tensor.dtype in (torch.int32, torch.int64)
                and tuple(tensor.shape) == (length,)
                and tensor.device == x.device
            ),
            f"{name} is {None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.device)}; "
            f"expected int32 or int64 ({length},) on {x.device}",
        )


def _check_values(rows: int, rank: int, offsets: Tensor, ranks: Tensor | None) -> None:
    bounds = offsets.tolist()
    require(
        bounds[0] == 0 and bounds[-1] == rows and all(p <= q for p, q in pairwise(bounds)),
        f"offsets are {bounds[:8]}{'...' if len(bounds) > 8 else ''}; expected a monotone sequence from 0 to {rows}",
    )
    if ranks is not None:
        used = ranks.tolist()
        require(all(1 <= u <= rank for u in used), f"ranks are {used[:8]}; expected numbers from 1 to {rank}")


def grouped_adapter(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    activation: str = "linear",
    *,
    ranks: Tensor | None = None,
    validate: bool = True,
) -> Tensor:
    """``x_c + scale · act(x_c A_c) B_c`` for the rows of every client c, differentiable once in x, A and B.

    Args:
        x: ``(M, d)`` rows sorted by client; float32, bfloat16 or float16.
        a: ``(C, d, R)``.
        b: ``(C, R, d)``.
        offsets: ``(C + 1,)`` int32 or int64: client c owns rows ``offsets[c]`` to ``offsets[c + 1]``; may be none.
        scale: s.
        activation: ``"linear"`` or ``"gelu"``.
        ranks: ``(C,)`` int32 or int64, how many columns of A (rows of B) a client uses; R where not given. What is
            beyond is not read as numbers, and its gradient is zero.
        validate: check the values of offsets and ranks, which waits for the device once. Without it wrong offsets
            cannot make anything be read or written out of bounds, but leave rows unwritten or write them twice.

    Returns:
        ``(M, d)``.

    Raises:
        KernelArgumentError: device, dtype, shape or values do not fit.
    """
    _check(x, a, b, offsets, ranks, activation)
    if validate and not is_traced(x):
        _check_values(x.shape[0], a.shape[2], offsets, ranks)
    if not runs_triton(x):
        return grouped_adapter_reference(x, a, b, offsets, scale, activation, ranks)
    if is_traced(x):
        y, _ = _forward_op(as_rows(x), a, b, offsets, ranks, float(scale), activation)
        traced: Tensor = y
        return traced
    result: Tensor = _Function.apply(as_rows(x), a, b, offsets, ranks, float(scale), activation)  # type: ignore[no-untyped-call]
    return result
