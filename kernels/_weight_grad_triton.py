# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gradients of thin matrices: ``bigᵀ small`` for big ``(M, k)`` and small ``(M, r)``, optionally sample by sample.

The rows are cut into samples of equal length. A program owns a slice of k and a run of samples; it forms the gradient
of one sample in registers and then adds it, its square (the diagonal Fisher) and the sum of its squares (the norm) to
what it has. So the exact per-sample Fisher costs no extra read and no memory that grows with the batch. The plain
gradient is the same code with a "sample" per program. Programs write partial sums, which a second kernel adds in a
fixed order: no atomics, so a rerun gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv, next_power_of_2
from ._launch import Plan
from ._triton_common import dot, narrow, precision
from ._tuning import Config


@triton.jit
def _flush(acc, grad, fisher, at, FISHER: tl.constexpr):
    """Add the gradient of one sample, its square, and write its squared norm to ``at``."""
    if FISHER:
        square = acc * acc
        fisher += square
        tl.store(at, tl.sum(tl.sum(square, 1), 0))
    return grad + acc, fisher


@triton.jit
def _gradient_kernel(
    big0,  # (M, k)
    small0,  # (M, r)
    big1,  # (M, k1), the second product's, if the grid has one
    small1,  # (M, r)
    part0,  # (splits, k, r) float32, or the result itself if there is one split
    part1,
    fisher_part,  # (splits, k, r) float32
    norm_part,  # (k blocks, samples) float32
    M,
    rows,  # rows of one sample
    samples,
    per_split,  # samples of one program
    stride_big0,
    stride_small0,
    stride_big1,
    stride_small1,
    stride_k0,
    stride_r0,
    stride_k1,
    stride_r1,
    scale0,
    scale1,
    K0: tl.constexpr,
    K1: tl.constexpr,
    R: tl.constexpr,
    FISHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Selected, not branched on: two loops in two branches would each be given shared memory of their own.
    one = tl.program_id(2) == 0
    big = tl.where(one, big0, big1)
    small = tl.where(one, small0, small1)
    part = tl.where(one, part0, part1)
    stride_big = tl.where(one, stride_big0, stride_big1)
    stride_small = tl.where(one, stride_small0, stride_small1)
    stride_k = tl.where(one, stride_k0, stride_k1)
    stride_r = tl.where(one, stride_r0, stride_r1)
    scale = tl.where(one, scale0, scale1)
    K = tl.where(one, K0, K1)
    if tl.program_id(1) * BLOCK_K >= K:
        return
    split = tl.program_id(0)
    block = tl.program_id(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    lane = tl.arange(0, BLOCK_M)
    in_k = k < K
    in_rank = rank < R
    grad = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    fisher = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    start = split * per_split
    # One loop over the blocks of all samples of this program, so that the loads of the next sample are under way while
    # this one is finished.
    blocks = tl.cdiv(rows, BLOCK_M)
    for step in tl.range(0, (tl.minimum(start + per_split, samples) - start) * blocks, num_stages=STAGES):
        sample = start + step // blocks
        begin = sample.to(tl.int64) * rows
        end = tl.minimum(begin + rows, M)
        row = begin + (step % blocks) * BLOCK_M + lane
        # A row past the sample's end repeats its last row in `big` and is zero in `small`: it adds nothing, and a value
        # that is not finite cannot leak in from the next sample.
        safe = tl.minimum(row, end - 1)
        if K0 % BLOCK_K == 0 and K1 % BLOCK_K == 0:
            bigs = tl.load(big + safe[:, None] * stride_big + k[None, :])
        else:
            bigs = tl.load(big + safe[:, None] * stride_big + k[None, :], mask=in_k[None, :], other=0.0)
        inside = (row < end)[:, None] & in_rank[None, :]
        smalls = tl.load(small + safe[:, None] * stride_small + rank[None, :], mask=inside, other=0.0)
        acc = dot(tl.trans(bigs), smalls, acc, PRECISION)
        if FISHER:  # noqa: SIM102  (a constant, decided when compiled)
            if step % blocks == blocks - 1:
                grad, fisher = _flush(acc, grad, fisher, norm_part + block * samples + sample, FISHER)
                acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    keep = in_k[:, None] & in_rank[None, :]
    base = split.to(tl.int64) * K * R
    if FISHER:
        tl.store(fisher_part + base + k[:, None] * R + rank[None, :], fisher, mask=keep)
    else:
        grad = acc
    at = part + base + k[:, None] * stride_k + rank[None, :] * stride_r
    tl.store(at, narrow(grad * scale, part0.dtype.element_ty, PRECISION), mask=keep)


@triton.jit
def _sum_parts(
    part,
    out,
    scale,
    stride_k,
    stride_r,
    SPLITS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = where < K * R
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(part + tl.cast(split, tl.int64) * K * R + where, mask=keep, other=0.0)
    target = out + (where // R) * stride_k + (where % R) * stride_r
    tl.store(target, narrow(total * scale, out.dtype.element_ty, PRECISION), mask=keep)


@triton.jit
def _sum_kernel(
    part0, part1, fisher_part, norm_part, out0, out1, fisher, norms,
    samples, stride_k0, stride_r0, stride_k1, stride_r1, scale0, scale1,
    SPLITS: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, R: tl.constexpr, PAIR: tl.constexpr,
    FISHER: tl.constexpr, NORM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(1)
    if job == 0:
        _sum_parts(part0, out0, scale0, stride_k0, stride_r0, SPLITS, K0, R, BLOCK, PRECISION)
    elif PAIR:
        _sum_parts(part1, out1, scale1, stride_k1, stride_r1, SPLITS, K1, R, BLOCK, PRECISION)
    elif FISHER:
        if job == 1:
            _sum_parts(
                fisher_part, fisher, scale0 * scale0, stride_k0, stride_r0, SPLITS, K0, R, BLOCK, PRECISION
            )
        else:
            sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for block in range(NORM_BLOCKS):
                total += tl.load(norm_part + block * samples + sample, mask=sample < samples, other=0.0)
            tl.store(norms + sample, tl.sqrt(total) * tl.abs(scale0), mask=sample < samples)


@dataclass(frozen=True)
class Product:
    """One gradient ``scale * bigᵀ small``, written to ``out`` ``(k, r)`` through its strides."""

    big: Tensor  # (M, k), unit stride along k
    small: Tensor  # (M, r), unit stride along r
    out: Tensor  # (k, r), any strides
    scale: float = 1.0


def heuristic(M: int, K: int, R: int, jobs: int, dtype: torch.dtype, sms: int) -> Config:
    """Block sizes, and the number of partial sums, for a card that is not in the table."""
    if dtype == torch.float32:
        block_k, block_m = 32, 16
    else:
        block_k, block_m = min(128, 8192 // max(16, next_power_of_2(R)), max(16, next_power_of_2(K))), 64
    tiles = cdiv(K, block_k) * jobs
    splits = max(1, min(cdiv(2 * sms, tiles), cdiv(M, 4 * block_m), 32))
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "SPLITS": splits, "num_warps": 4, "STAGES": 3}


def _steps(
    first: Product, second: Product | None, rows: int, samples: int, fisher: bool, config: Config
) -> tuple[Plan, Plan | None, int]:
    """The launch of the gradients, the launch of the sums (none if there is one split), and the number of splits."""
    M, K0 = first.big.shape
    R = first.small.shape[1]
    other = first if second is None else second
    K1 = other.big.shape[1]
    per_split = cdiv(samples, config["SPLITS"])
    splits = cdiv(samples, per_split)
    k_blocks = cdiv(max(K0, K1), config["BLOCK_K"])
    direct = splits == 1 and not fisher
    outs = (*first.out.stride(), *other.out.stride())
    shared = {"K0": K0, "K1": K1, "R": R}
    gradient = Plan(
        _gradient_kernel,
        (splits, k_blocks, 1 if second is None else 2),
        (
            M, rows, samples, per_split, first.big.stride(0), first.small.stride(0), other.big.stride(0),
            other.small.stride(0), *(outs if direct else (R, 1, R, 1)),
        ),
        {
            **shared, "FISHER": fisher, "BLOCK_M": config["BLOCK_M"], "BLOCK_K": config["BLOCK_K"],
            "BLOCK_R": max(16, next_power_of_2(R)), "PRECISION": precision(first.big), "STAGES": config["STAGES"],
        },
        config["num_warps"],
    )  # fmt: skip
    if direct:
        return gradient, None, 1
    block = 256
    longest = max(K0 * R, K1 * R, samples if fisher else 0)
    total = Plan(
        _sum_kernel,
        (cdiv(longest, block), 3 if fisher else 1 if second is None else 2),
        (samples, *outs),
        {
            "SPLITS": splits, **shared, "PAIR": second is not None, "FISHER": fisher,
            "NORM_BLOCKS": k_blocks, "BLOCK": block, "PRECISION": precision(first.big),
        },
        4,
    )  # fmt: skip
    return gradient, total, splits


_steps_of: dict[tuple[object, ...], tuple[Plan, Plan | None, int]] = {}


def _run(
    first: Product, second: Product | None, rows: int, samples: int, fisher: Tensor | None, norms: Tensor | None,
    choose: Callable[[], Config],
) -> None:  # fmt: skip
    other = first if second is None else second
    key = (
        _tuning.version(), second is None, fisher is None, rows, first.big.dtype, first.big.device, first.out.dtype,
        other.out.dtype, first.big.shape, first.big.stride(), first.small.shape, first.small.stride(),
        first.out.stride(), other.big.shape, other.big.stride(), other.small.stride(), other.out.stride(),
    )  # fmt: skip
    steps = _steps_of.get(key)
    if steps is None:
        if len(_steps_of) >= 1024:
            _steps_of.clear()
        config = choose()
        if not rows:  # no samples: one "sample" for each program
            rows = cdiv(cdiv(first.big.shape[0], config["SPLITS"]), config["BLOCK_M"]) * config["BLOCK_M"]
            samples = cdiv(first.big.shape[0], rows)
        steps = _steps_of[key] = _steps(first, second, rows, samples, fisher is not None, config)
    gradient, total, splits = steps
    inputs = (first.big, first.small, other.big, other.small)
    if total is None:
        gradient((*inputs, first.out, other.out, first.out, first.out), (first.scale, other.scale))
        return
    K0, K1, R = first.big.shape[1], other.big.shape[1], first.small.shape[1]

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=first.big.device)

    part0 = scratch(splits, K0, R)
    part1 = part0 if second is None else scratch(splits, K1, R)
    fisher_part, norm_part = part0, part0
    if fisher is not None:
        fisher_part = scratch(splits, K0, R)
        norm_part = scratch(int(gradient.grid[1]), samples)
    gradient((*inputs, part0, part1, fisher_part, norm_part), (1.0, 1.0))
    total(
        (
            part0, part1, fisher_part, norm_part, first.out, other.out,
            part0 if fisher is None else fisher, part0 if norms is None else norms,
        ),
        (first.scale, other.scale),
    )  # fmt: skip


def gradients(first: Product, second: Product | None = None) -> None:
    """Write one or two plain gradients in one launch (and one for the sums, if the rows are split)."""
    M, K = first.big.shape
    if M == 0:
        for product in (first, second):
            if product is not None:
                product.out.zero_()
        return

    def choose() -> Config:
        wide = K if second is None else max(K, second.big.shape[1])
        R, size = first.small.shape[1], first.big.element_size()
        jobs = 1 if second is None else 2
        key = f"k{_tuning.bucket(wide)}_r{next_power_of_2(R)}_m{_tuning.bucket(M)}_j{jobs}_{size}"
        sms = _tuning.multiprocessors(first.big.device)
        fallback = heuristic(M, wide, R, jobs, first.big.dtype, sms)
        return _tuning.choose("weight_grad", first.big.device, key, fallback)

    _run(first, second, 0, 0, None, None, choose)


def gradients_by_sample(product: Product, rows: int, fisher: Tensor, norms: Tensor) -> None:
    """Write the gradient, the sum of squared per-sample gradients ``(k, r)`` and the per-sample norms ``(N,)``.

    Args:
        product: M = N * rows rows, sorted by sample.
        rows: rows of one sample, at least 1.
        fisher: ``(k, r)`` float32, with the strides of ``product.out``.
        norms: ``(N,)`` float32.
    """
    M, K = product.big.shape
    samples = M // rows

    def choose() -> Config:
        R, size = product.small.shape[1], product.big.element_size()
        key = f"k{_tuning.bucket(K)}_r{next_power_of_2(R)}_t{_tuning.bucket(rows)}_n{_tuning.bucket(samples)}_{size}"
        sms = _tuning.multiprocessors(product.big.device)
        fallback = heuristic(M, K, R, 1, product.big.dtype, sms)
        return _tuning.choose("weight_grad_fisher", product.big.device, key, fallback)

    _run(product, None, rows, samples, fisher, norms, choose)
