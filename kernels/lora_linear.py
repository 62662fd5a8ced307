"""``y = x Wᵀ + bias + s (x Aᵀ) M Bᵀ`` over a frozen W, with M the identity, a diagonal or a dense ``(r, r)`` matrix.

That one form is LoRA (M = I), SoRA, SVFit and IncreLoRA (diagonal M), LoRA-XS, LoRA-SB and LaMDA (dense M, frozen A and
B). The large products stay with cuBLAS, which no Triton product beats by enough; what is saved are the passes around
them. One kernel reads x and writes ``s (x Aᵀ) M Bᵀ + bias`` into y, and cuBLAS adds ``x Wᵀ`` to it as it writes y. The
backward is the same with dy, and one more launch makes both weight gradients. If A is frozen, only ``x Aᵀ`` is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _tuning
from ._dispatch import as_rows, check_tensor, is_traced, next_power_of_2, require, runs_triton

__all__ = ["lora_linear", "lora_linear_reference"]


def _mixed(s: Tensor, mix: Tensor | None) -> Tensor:
    """``s M`` for M absent, ``(r,)`` or ``(r, r)``."""
    if mix is None:
        return s
    return s * mix if mix.dim() == 1 else s @ mix


def lora_linear_reference(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, mix: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in plain torch; arguments as in ``lora_linear``."""
    return torch.nn.functional.linear(x, weight, bias) + scale * (_mixed(x @ a.T, mix) @ b.T)


_checked: set[tuple[object, ...]] = set()  # what was found good; looking is cheaper than checking again


@functools.lru_cache(maxsize=1024)
def _chunk_rows(rows: int, wide: int, r: int, itemsize: int, device: torch.device, version: int) -> int:
    key = f"k{_tuning.bucket(wide)}_r{next_power_of_2(r)}_m{_tuning.bucket(rows)}_{itemsize}"
    return _tuning.choose("lora_linear", device, key, {"CHUNK": 0})["CHUNK"] or rows


def _chunk(x: Tensor, wide: int, r: int) -> int:
    """Rows of one chunk: a chunk's y is still in the cache when cuBLAS comes back to add to it."""
    return _chunk_rows(x.shape[0], max(x.shape[1], wide), r, x.element_size(), x.device, _tuning.version())


def _forward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, mix: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``(M, n)`` and ``x Aᵀ`` ``(M, r)``."""
    from . import _shrink_expand_triton as se

    y = x.new_empty(x.shape[0], weight.shape[0])
    s = x.new_empty(x.shape[0], a.shape[0])
    up = b.T if mix is None else _mixed(torch.eye(a.shape[0], dtype=x.dtype, device=x.device), mix) @ b.T
    chunk = _chunk(x, weight.shape[0], a.shape[0])
    for start in range(0, x.shape[0], chunk):
        rows, low, out = x, s, y
        if chunk < x.shape[0]:
            part = slice(start, start + chunk)
            rows, low, out = x[part], s[part], y[part]
        se.launch(
            rows, a.T, up, mode=se.LINEAR, scale=scale, residual=False, saved=low, mid=low, act=low, out=out,
            bias=bias,
        )  # fmt: skip
        out.addmm_(rows, weight.T)
    return y, s


def _gradients(
    dy: Tensor, x: Tensor | None, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, mix: Tensor | None, scale: float,
    need_x: bool, need_a: bool, need_b: bool, need_mix: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients to x, A, B and M, None where not needed."""
    from . import _shrink_expand_triton as se
    from . import _weight_grad_triton as wg

    r = a.shape[0]
    g = torch.empty_like(s)  # the gradient at (x Aᵀ) M, times the scale
    square = None if mix is None else torch.diag(mix) if mix.dim() == 1 else mix
    down = a if square is None else square.T @ a
    dx = dy.new_empty(dy.shape[0], weight.shape[1]) if need_x else None
    chunk = _chunk(dy, weight.shape[1], r)
    for start in range(0, dy.shape[0], chunk) if need_x or need_a or need_mix else ():
        rows, low, target = dy, g, dx
        if chunk < dy.shape[0]:
            part = slice(start, start + chunk)
            rows, low, target = dy[part], g[part], None if dx is None else dx[part]
        se.launch(
            rows, b, down, mode=se.LINEAR_BACKWARD, scale=scale, residual=False, saved=low, mid=low, act=low,
            out=target,
        )  # fmt: skip
        if target is not None:
            target.addmm_(rows, weight)
    da = db = dmix = None
    raw = torch.float32 if square is not None else a.dtype
    left = right = None
    if need_a:
        assert x is not None
        da = torch.empty(a.shape, dtype=raw, device=a.device)
        left = wg.Product(x, g, da.T)
    if need_b:
        db = torch.empty(b.shape, dtype=raw, device=b.device)
        right = wg.Product(dy, s, db, scale)
    both = [product for product in (left, right) if product is not None]
    if both:
        wg.gradients(*both)
    if square is not None:
        if da is not None:
            da = (square.float() @ da).to(a.dtype)
        if db is not None:
            db = (db @ square.float()).to(b.dtype)
        if need_mix:
            assert mix is not None
            dmix = s.T @ g if mix.dim() == 2 else (s.float() * g.float()).sum(0).to(mix.dtype)
    return dx, da, db, dmix


class _Function(torch.autograd.Function):
    """The eager path, without the dispatcher's overhead."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        mix: Tensor | None,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        y, s = _forward(x, weight, a, b, mix, bias, scale)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, s, weight, a, b, mix)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, a, b, mix = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, da, db, dmix = _gradients(
            as_rows(grads[0]), x, s, weight, a, b, mix, ctx.scale, needs[0], needs[2], needs[3], needs[4]
        )
        return dx, None, da, db, dmix, None, None


@torch.library.custom_op("fednano::lora_linear", mutates_args=())
def _forward_op(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, mix: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, a, b, mix, bias, scale)


@_forward_op.register_fake
def _(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, mix: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("fednano::lora_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor | None, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, mix: Tensor | None, scale: float,
    need_x: bool, need_a: bool, need_b: bool, need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """An empty tensor stands for a gradient that is not needed."""
    found = _gradients(dy, x, s, weight, a, b, mix, scale, need_x, need_a, need_b, need_mix)
    dx, da, db, dmix = (dy.new_empty(0) if f is None else f for f in found)
    return dx, da, db, dmix


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor | None, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, mix: Tensor | None, scale: float,
    need_x: bool, need_a: bool, need_b: bool, need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        dy.new_empty((dy.shape[0], weight.shape[1]) if need_x else (0,)),
        a.new_empty(a.shape if need_a else (0,)),
        b.new_empty(b.shape if need_b else (0,)),
        dy.new_empty(mix.shape if mix is not None and need_mix else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, a, b, mix, _, ctx.scale = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, output[1], weight, a, b, mix)


def _op_backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, s, weight, a, b, mix = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = _backward_op(as_rows(dy), x, s, weight, a, b, mix, ctx.scale, *needs)
    dx, da, db, dmix = (f if needed else None for f, needed in zip(found, needs, strict=True))
    return dx, None, da, db, dmix, None, None


_forward_op.register_autograd(_op_backward, setup_context=_setup)


def _check(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, mix: Tensor | None, bias: Tensor | None) -> None:
    check_tensor("x", x)
    require(
        x.dim() >= 1 and x.numel() >= 1,
        f"x has shape {tuple(x.shape)}; expected (..., k) with at least one row",
    )
    check_tensor("weight", weight, shape=(None, x.shape[-1]), like=x)
    check_tensor("a", a, shape=(None, x.shape[-1]), like=x)
    r = a.shape[0]
    require(r >= 1, "a has rank 0; an adapter needs rank 1 at least")
    check_tensor("b", b, shape=(weight.shape[0], r), like=x)
    require(not weight.requires_grad, "weight requires a gradient; this operator is for a frozen weight")
    if mix is not None:
        check_tensor("mix", mix, shape=(r,) if mix.dim() == 1 else (r, r), like=x)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), like=x)
        require(not bias.requires_grad, "bias requires a gradient; this operator is for a frozen one")
        require(bias.is_contiguous(), "bias is not contiguous")


def lora_linear(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, mix: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x Wᵀ + bias + scale · (x Aᵀ) M Bᵀ``, differentiable once in x, A, B and M.

    Args:
        x: ``(..., k)``, float32, bfloat16 or float16.
        weight: ``(n, k)``, frozen, same dtype and device.
        a: ``(r, k)``; frozen or trained. If frozen, x is not kept for the backward.
        b: ``(n, r)``; frozen or trained.
        scale: s.
        mix: M: None for the identity, ``(r,)`` for a diagonal, ``(r, r)`` for a dense one.
        bias: ``(n,)``, frozen.

    Returns:
        ``(..., n)``.

    Raises:
        KernelArgumentError: device, dtype or shape do not fit, or the rank is 0, or x is empty.
    """
    known = (
        x.shape, weight.shape, a.shape, b.shape, x.dtype, weight.dtype, a.dtype, b.dtype, x.device, weight.device,
        a.device, b.device, weight.requires_grad,
    )  # fmt: skip
    if mix is not None or bias is not None or known not in _checked:
        _check(x, weight, a, b, mix, bias)
        if len(_checked) >= 4096:
            _checked.clear()
        _checked.add(known)
    if not runs_triton(x):
        return lora_linear_reference(x, weight, a, b, scale, mix, bias)
    if is_traced(x):
        y = _forward_op(as_rows(x), weight, a, b, mix, bias, float(scale))[0]
    else:
        y = _Function.apply(as_rows(x), weight, a, b, mix, bias, float(scale))  # type: ignore[no-untyped-call]
    result: Tensor = y.view(*x.shape[:-1], weight.shape[0])
    return result
