"""``Σ_k c_k P_k`` with seeded random P_k that are never stored: NOLA (arXiv 2310.02556), and bases such as RandLoRA's.

The numbers come from the counter-based generator Philox4x32-10 (Salmon et al., SC 2011), so they are the same bits on a
CPU, in torch on a GPU, and in the kernel. Element e of plane k is word ``k % 4`` of the block with counter
``(e, k // 4, 0, 0)`` under a 64-bit key; the word w stands for ``float32(2 (w >> 8) − (2^24 − 1))`` times
``float32(bound / 2^24)``, uniform in (−bound, bound). One Philox block therefore serves four planes.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ._dispatch import check_tensor, is_traced, require, runs_triton

__all__ = ["seeded_combine", "seeded_combine_reference", "seeded_uniform", "seeded_uniform_reference"]

_MASK = 0xFFFFFFFF
_ELEMENTS = 1 << 22  # random numbers that the reference holds at once


def _philox(c0: Tensor, c1: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, as int64, of the blocks with counters ``(c0, c1, 0, 0)``."""
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _unit(bound: float) -> float:
    """``bound / 2^24``, rounded to float32: every device must multiply by the same number."""
    rounded: float = struct.unpack("f", struct.pack("f", bound / 2**24))[0]
    return rounded


def seeded_uniform_reference(key: Tensor, planes: int, n: int, bound: float, first: int = 0) -> Tensor:
    """Planes ``first`` to ``first + planes`` in plain torch; arguments as in ``seeded_uniform``."""
    low, high = first // 4, (first + planes + 3) // 4
    element = torch.arange(n, dtype=torch.int64, device=key.device)[None, :]
    group = torch.arange(low, high, dtype=torch.int64, device=key.device)[:, None]
    zero = torch.zeros_like(element + group)
    words = torch.stack(_philox(zero + element, zero + group, key), 1).view(4 * (high - low), n)
    words = words[first - 4 * low : first - 4 * low + planes]
    return (2 * (words >> 8) - (2**24 - 1)).to(torch.float32) * _unit(bound)


def seeded_combine_reference(coefficients: Tensor, key: Tensor, n: int, bound: float) -> Tensor:
    """``(K,)`` -> ``(n,)`` in plain torch, a few planes at a time; arguments as in ``seeded_combine``."""
    size = max(4, _ELEMENTS // n // 4 * 4)
    total = coefficients.new_zeros(n)
    for start in range(0, coefficients.shape[0], size):
        part = coefficients[start : start + size]
        total = total + part @ seeded_uniform_reference(key, part.shape[0], n, bound, start).to(part.dtype)
    return total


def _combine(coefficients: Tensor, key: Tensor, n: int, bound: float) -> Tensor:
    from . import _seeded_triton as sd

    out = torch.empty(n, dtype=coefficients.dtype, device=coefficients.device)
    sd.combine(coefficients, key, out, _unit(bound))
    return out


def _project(gradient: Tensor, key: Tensor, planes: int, bound: float) -> Tensor:
    """``(n,)`` -> ``<P_k, gradient>`` ``(planes,)``."""
    from . import _seeded_triton as sd

    return sd.project(gradient, key, planes, _unit(bound))


@torch.library.custom_op("fednano::seeded_combine", mutates_args=())
def _forward_op(coefficients: Tensor, key: Tensor, n: int, bound: float) -> Tensor:
    return _combine(coefficients, key, n, bound)


@_forward_op.register_fake
def _(coefficients: Tensor, key: Tensor, n: int, bound: float) -> Tensor:
    return coefficients.new_empty(n)


@torch.library.custom_op("fednano::seeded_project", mutates_args=())
def _backward_op(gradient: Tensor, key: Tensor, planes: int, bound: float) -> Tensor:
    return _project(gradient, key, planes, bound)


@_backward_op.register_fake
def _(gradient: Tensor, key: Tensor, planes: int, bound: float) -> Tensor:
    return gradient.new_empty(planes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefficients, key, _, ctx.bound = inputs
    ctx.planes = coefficients.shape[0]
    ctx.save_for_backward(key)


def _op_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _backward_op(gradient.contiguous(), ctx.saved_tensors[0], ctx.planes, ctx.bound), None, None, None


_forward_op.register_autograd(_op_backward, setup_context=_setup)


class _Function(torch.autograd.Function):
    """The same pair without the dispatcher's overhead, for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, key: Tensor, n: int, bound: float) -> Tensor:
        ctx.save_for_backward(key)
        ctx.planes, ctx.bound = coefficients.shape[0], bound
        return _combine(coefficients, key, n, bound)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _project(grads[0].contiguous(), ctx.saved_tensors[0], ctx.planes, ctx.bound), None, None, None


def _check_key(key: Tensor, n: int, planes: int, bound: float) -> None:
    require(
        key.dtype == torch.int64 and key.dim() == 0,
        f"key is {key.dtype} {tuple(key.shape)}; expected a 0-d int64 tensor",
    )
    require(1 <= n < 2**31, f"n is {n}; expected 1 to 2^31 - 1")
    require(1 <= planes < 2**31, f"there are {planes} planes; expected 1 to 2^31 - 1")
    require(bound > 0, f"bound is {bound}; expected a positive number")


def seeded_uniform(key: Tensor, planes: int, n: int, bound: float) -> Tensor:
    """Draw the planes themselves, for a basis that is used dense (RandLoRA): the same bits on every device.

    Args:
        key: 0-d int64, the 64 bits of the Philox key.
        planes: K.
        n: elements of a plane.
        bound: half width of the distribution.

    Returns:
        ``(K, n)`` float32.

    Raises:
        KernelArgumentError: the key is not a 0-d int64, or a number is out of range.
    """
    _check_key(key, n, planes, bound)
    if not runs_triton(key):
        return seeded_uniform_reference(key, planes, n, bound)
    from . import _seeded_triton as sd

    out = torch.empty(planes, n, dtype=torch.float32, device=key.device)
    sd.draw(key, out, _unit(bound))
    return out


def seeded_combine(coefficients: Tensor, key: Tensor, n: int, bound: float) -> Tensor:
    """``Σ_k c_k P_k``, differentiable once in the coefficients; no P_k is ever in memory.

    Args:
        coefficients: ``(K,)`` float32, bfloat16 or float16.
        key: 0-d int64 on the same device, the 64 bits of the Philox key.
        n: elements of a plane.
        bound: half width of the distribution of P_k.

    Returns:
        ``(n,)``, dtype of the coefficients.

    Raises:
        KernelArgumentError: device, dtype or shape do not fit, or a number is out of range.
    """
    check_tensor("coefficients", coefficients, shape=(None,))
    _check_key(key, n, coefficients.shape[0], bound)
    require(key.device == coefficients.device, f"key is on {key.device}; expected {coefficients.device}")
    if not runs_triton(coefficients):
        return seeded_combine_reference(coefficients, key, n, bound)
    if is_traced(coefficients):
        traced: Tensor = _forward_op(coefficients, key, n, bound)
        return traced
    out: Tensor = _Function.apply(coefficients, key, n, bound)  # type: ignore[no-untyped-call]
    return out
