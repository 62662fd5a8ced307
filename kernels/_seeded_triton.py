# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Random planes by Philox4x32-10, four planes a block, used where they are drawn."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv
from ._launch import launch
from ._triton_common import narrow, precision


@triton.jit
def _value(word, unit):
    """The odd integer that the upper 24 bits stand for, times one float32."""
    return (2 * (word >> 8).to(tl.int32) - 16777215).to(tl.float32) * unit


@triton.jit
def _block(key, element, group, unit):
    """Elements of planes ``4 group`` to ``4 group + 3``; counters are 32 bit wide, which keeps Philox4x32."""
    zero = (element * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, element.to(tl.uint32), zero + tl.cast(group, tl.uint32), zero, zero)
    return _value(w0, unit), _value(w1, unit), _value(w2, unit), _value(w3, unit)


@triton.jit
def _combine_kernel(
    coefficients,  # (planes,)
    key,  # () int64
    part,  # (splits, n) float32
    n,
    planes,
    per_split,  # groups of four planes of one program
    unit,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    k = tl.load(key)
    total = tl.zeros((BLOCK,), tl.float32)
    for group in range(split * per_split, tl.minimum((split + 1) * per_split, (planes + 3) // 4)):
        u0, u1, u2, u3 = _block(k, element, group, unit)
        at = coefficients + 4 * group
        total += tl.load(at).to(tl.float32) * u0
        total += tl.load(at + 1, mask=4 * group + 1 < planes, other=0.0).to(tl.float32) * u1
        total += tl.load(at + 2, mask=4 * group + 2 < planes, other=0.0).to(tl.float32) * u2
        total += tl.load(at + 3, mask=4 * group + 3 < planes, other=0.0).to(tl.float32) * u3
    tl.store(part + tl.cast(split, tl.int64) * n + element, total, mask=element < n)


@triton.jit
def _add_kernel(part, out, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(part + tl.cast(split, tl.int64) * n + element, mask=element < n, other=0.0)
    tl.store(out + element, narrow(total, out.dtype.element_ty, PRECISION), mask=element < n)


@triton.jit
def _project_kernel(
    gradient,  # (n,)
    key,  # () int64
    part,  # (splits, groups * 4) float32
    n,
    planes,
    per_split,  # elements of one program
    unit,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    split = tl.program_id(1)
    k = tl.load(key)
    t0 = tl.zeros((BLOCK,), tl.float32)
    t1 = tl.zeros((BLOCK,), tl.float32)
    t2 = tl.zeros((BLOCK,), tl.float32)
    t3 = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum((split + 1) * per_split, n)
    for start in range(split * per_split, end, BLOCK):
        element = start + tl.arange(0, BLOCK)
        g = tl.load(gradient + element, mask=element < end, other=0.0).to(tl.float32)
        u0, u1, u2, u3 = _block(k, element, group, unit)
        t0 += g * u0
        t1 += g * u1
        t2 += g * u2
        t3 += g * u3
    at = part + split * tl.num_programs(0) * 4 + 4 * group
    tl.store(at, tl.sum(t0, 0))
    tl.store(at + 1, tl.sum(t1, 0))
    tl.store(at + 2, tl.sum(t2, 0))
    tl.store(at + 3, tl.sum(t3, 0))


@triton.jit
def _draw_kernel(key, out, n, planes, unit, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    u0, u1, u2, u3 = _block(tl.load(key), element, group, unit)
    at = out + tl.cast(group, tl.int64) * 4 * n + element
    inside = element < n
    plane = 4 * group + tl.zeros_like(element)
    tl.store(at, u0, mask=inside)
    tl.store(at + n, u1, mask=inside & (plane + 1 < planes))
    tl.store(at + 2 * tl.cast(n, tl.int64), u2, mask=inside & (plane + 2 < planes))
    tl.store(at + 3 * tl.cast(n, tl.int64), u3, mask=inside & (plane + 3 < planes))


def _splits(work: int, pieces: int, sms: int) -> int:
    """How often to cut a sum so that every multiprocessor has some programs."""
    return max(1, min(work, cdiv(8 * sms, max(pieces, 1))))


def combine(coefficients: Tensor, key: Tensor, out: Tensor, unit: float) -> None:
    """``out = Σ_k coefficients[k] P_k``.

    Args:
        coefficients: ``(planes,)``.
        key: 0-d int64.
        out: ``(n,)``.
        unit: bound / 2^24 as float32.
    """
    n, planes = out.numel(), coefficients.numel()
    block = 512 if out.device.type == "cuda" else 64
    groups = cdiv(planes, 4)
    per_split = cdiv(groups, _splits(groups, cdiv(n, block), _tuning.multiprocessors(out.device)))
    splits = cdiv(groups, per_split)
    part = torch.empty(splits, n, dtype=torch.float32, device=out.device)
    coefficients = coefficients.contiguous()
    grid = (cdiv(n, block), splits)
    launch(
        _combine_kernel, grid, (coefficients, key, part), (n, planes, per_split), (unit,), {"BLOCK": block}, 4
    )
    constants = {"SPLITS": splits, "BLOCK": block, "PRECISION": precision(out)}
    launch(_add_kernel, (cdiv(n, block),), (part, out), (n,), (), constants, 4)


def project(gradient: Tensor, key: Tensor, planes: int, unit: float) -> Tensor:
    """``<P_k, gradient>`` for every plane, ``(planes,)`` in the dtype of the gradient.

    Args:
        gradient: ``(n,)``, contiguous.
        key: 0-d int64.
        planes: number of planes.
        unit: bound / 2^24 as float32.
    """
    n = gradient.numel()
    block = 512 if gradient.device.type == "cuda" else 64
    groups = cdiv(planes, 4)
    blocks = cdiv(n, block)
    per_split = cdiv(blocks, _splits(blocks, groups, _tuning.multiprocessors(gradient.device))) * block
    splits = cdiv(n, per_split)
    part = torch.empty(splits, 4 * groups, dtype=torch.float32, device=gradient.device)
    sizes = (n, planes, per_split)
    launch(_project_kernel, (groups, splits), (gradient, key, part), sizes, (unit,), {"BLOCK": block}, 4)
    out = torch.empty(planes, dtype=gradient.dtype, device=gradient.device)
    wide = torch.empty(4 * groups, dtype=gradient.dtype, device=gradient.device)
    constants = {"SPLITS": splits, "BLOCK": block, "PRECISION": precision(gradient)}
    launch(_add_kernel, (cdiv(4 * groups, block),), (part, wide), (4 * groups,), (), constants, 4)
    return out.copy_(wide[:planes])


def draw(key: Tensor, out: Tensor, unit: float) -> None:
    """Write the planes ``(planes, n)`` float32.

    Args:
        key: 0-d int64.
        out: contiguous.
        unit: bound / 2^24 as float32.
    """
    planes, n = out.shape
    block = 512 if out.device.type == "cuda" else 64
    launch(
        _draw_kernel, (cdiv(n, block), cdiv(planes, 4)), (key, out), (n, planes), (unit,), {"BLOCK": block}, 4
    )
