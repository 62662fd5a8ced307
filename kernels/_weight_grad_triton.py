# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gradients of thin matrices: ``bigᵀ small`` for big ``(M, k)`` and small ``(M, r)``, optionally sample by sample.

The rows are cut into samples of equal length. A program owns a slice of k and a run of samples; it forms the gradient
of one sample in registers and then adds it, its square (the diagonal Fisher) and the sum of its squares (the norm) to
what it has. So the exact per-sample Fisher costs no extra read and no memory that grows with the batch. The plain
gradient is the same code with a "sample" per program. Programs write partial sums, which a second kernel adds in a
fixed order: no atomics, so a rerun gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv, next_power_of_2
from ._launch import launch
from ._triton_common import dot, narrow, precision
from ._tuning import Config


@triton.jit
def _accumulate(
    big,  # (M, k)
    small,  # (M, r)
    part,  # (splits, k, r) float32
    fisher_part,  # (splits, k, r) float32
    norm_part,  # (k blocks, samples) float32
    M,
    rows,  # rows of one sample
    samples,
    per_split,  # samples of one program
    stride_big,
    stride_small,
    K: tl.constexpr,
    R: tl.constexpr,
    FISHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0)
    block = tl.program_id(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    lane = tl.arange(0, BLOCK_M)
    in_k = k < K
    in_rank = rank < R
    grad = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    fisher = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    start = split * per_split
    for sample in range(start, tl.minimum(start + per_split, samples)):
        begin = tl.cast(sample, tl.int64) * rows
        end = tl.minimum(begin + rows, M)
        acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
        for offset in tl.range(0, rows, BLOCK_M, num_stages=STAGES):
            row = begin + offset + lane
            # A row past the sample's end repeats its last row in `big` and is zero in `small`: it adds nothing, and
            # a value that is not finite cannot leak in from the next sample.
            safe = tl.minimum(row, end - 1)
            if K % BLOCK_K == 0:
                bigs = tl.load(big + safe[:, None] * stride_big + k[None, :])
            else:
                bigs = tl.load(big + safe[:, None] * stride_big + k[None, :], mask=in_k[None, :], other=0.0)
            inside = (row < end)[:, None] & in_rank[None, :]
            smalls = tl.load(small + safe[:, None] * stride_small + rank[None, :], mask=inside, other=0.0)
            acc = dot(tl.trans(bigs), smalls, acc, PRECISION)
        if FISHER:
            square = acc * acc
            fisher += square
            tl.store(norm_part + block * samples + sample, tl.sum(tl.sum(square, 1), 0))
        grad += acc
    where = tl.cast(split, tl.int64) * K * R + k[:, None] * R + rank[None, :]
    keep = in_k[:, None] & in_rank[None, :]
    tl.store(part + where, grad, mask=keep)
    if FISHER:
        tl.store(fisher_part + where, fisher, mask=keep)


@triton.jit
def _gradient_kernel(
    big0,
    small0,
    big1,
    small1,
    part0,
    part1,
    fisher_part,
    norm_part,
    M,
    rows,
    samples,
    per_split,
    stride_big0,
    stride_small0,
    stride_big1,
    stride_small1,
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
    if tl.program_id(2) == 0:
        if tl.program_id(1) * BLOCK_K < K0:
            _accumulate(
                big0, small0, part0, fisher_part, norm_part, M, rows, samples, per_split, stride_big0, stride_small0,
                K0, R, FISHER, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, STAGES,
            )  # fmt: skip
    elif tl.program_id(1) * BLOCK_K < K1:
        _accumulate(
            big1, small1, part1, fisher_part, norm_part, M, rows, samples, per_split, stride_big1, stride_small1,
            K1, R, FISHER, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, STAGES,
        )  # fmt: skip


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
    part0,
    part1,
    fisher_part,
    norm_part,
    out0,
    out1,
    fisher,
    norms,
    scale0,
    scale1,
    samples,
    stride_k0,
    stride_r0,
    stride_k1,
    stride_r1,
    SPLITS: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    R: tl.constexpr,
    PAIR: tl.constexpr,
    FISHER: tl.constexpr,
    NORM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
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


def _run(
    first: Product, second: Product | None, *, rows: int, samples: int, fisher: Tensor | None, norms: Tensor | None,
    config: Config,
) -> None:  # fmt: skip
    M, K0 = first.big.shape
    R = first.small.shape[1]
    other = second if second is not None else first
    K1 = other.big.shape[1]
    with_fisher = fisher is not None
    per_split = cdiv(samples, config["SPLITS"])
    splits = cdiv(samples, per_split)
    k_blocks = cdiv(max(K0, K1), config["BLOCK_K"])

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=first.big.device)

    part0 = scratch(splits, K0, R)
    part1 = scratch(splits, K1, R) if second is not None else part0
    fisher_part = scratch(splits, K0, R) if with_fisher else part0
    norm_part = scratch(k_blocks, samples) if with_fisher else part0
    block_r = max(16, next_power_of_2(R))
    block = 256
    shared = {"K0": K0, "K1": K1, "R": R}
    launch(
        _gradient_kernel,
        (splits, k_blocks, 1 if second is None else 2),
        (
            first.big, first.small, other.big, other.small, part0, part1, fisher_part, norm_part,
            M, rows, samples, per_split,
            first.big.stride(0), first.small.stride(0), other.big.stride(0), other.small.stride(0),
        ),
        {
            **shared, "FISHER": with_fisher, "BLOCK_M": config["BLOCK_M"], "BLOCK_K": config["BLOCK_K"],
            "BLOCK_R": block_r, "PRECISION": precision(first.big), "STAGES": config["STAGES"],
        },
        config["num_warps"],
    )  # fmt: skip
    jobs = 3 if with_fisher else 1 if second is None else 2
    longest = max(K0 * R, K1 * R, samples if with_fisher else 0)
    launch(
        _sum_kernel,
        (cdiv(longest, block), jobs),
        (
            part0, part1, fisher_part, norm_part, first.out, other.out,
            fisher if fisher is not None else part0, norms if norms is not None else part0,
            first.scale, other.scale, samples,
            first.out.stride(0), first.out.stride(1), other.out.stride(0), other.out.stride(1),
        ),
        {
            "SPLITS": splits, **shared, "PAIR": second is not None, "FISHER": with_fisher,
            "NORM_BLOCKS": k_blocks, "BLOCK": block, "PRECISION": precision(first.big),
        },
        4,
    )  # fmt: skip


def gradients(first: Product, second: Product | None = None) -> None:
    """Write one or two plain gradients in one launch (and one for the sums)."""
    M, K = first.big.shape
    if second is not None:
        K = max(K, second.big.shape[1])
    R = first.small.shape[1]
    if M == 0:
        for product in (first, second):
            if product is not None:
                product.out.zero_()
        return
    jobs = 1 if second is None else 2
    key = (
        f"k{_tuning.bucket(K)}_r{next_power_of_2(R)}_m{_tuning.bucket(M)}_j{jobs}_{first.big.element_size()}"
    )
    sms = _tuning.multiprocessors(first.big.device)
    config = _tuning.choose(
        "weight_grad", first.big.device, key, heuristic(M, K, R, jobs, first.big.dtype, sms)
    )
    rows = cdiv(cdiv(M, config["SPLITS"]), config["BLOCK_M"]) * config["BLOCK_M"]
    _run(first, second, rows=rows, samples=cdiv(M, rows), fisher=None, norms=None, config=config)


def gradients_by_sample(product: Product, rows: int, fisher: Tensor, norms: Tensor) -> None:
    """Write the gradient, the sum of squared per-sample gradients ``(k, r)`` and the per-sample norms ``(N,)``.

    Args:
        product: M = N * rows rows, sorted by sample.
        rows: rows of one sample, at least 1.
        fisher: ``(k, r)`` float32, with the strides of ``product.out``.
        norms: ``(N,)`` float32.
    """
    M, K = product.big.shape
    R = product.small.shape[1]
    samples = M // rows
    key = f"k{_tuning.bucket(K)}_r{next_power_of_2(R)}_t{_tuning.bucket(rows)}_n{_tuning.bucket(samples)}"
    key += f"_{product.big.element_size()}"
    sms = _tuning.multiprocessors(product.big.device)
    fallback = heuristic(M, K, R, 1, product.big.dtype, sms)
    config = _tuning.choose("weight_grad_fisher", product.big.device, key, fallback)
    _run(product, None, rows=rows, samples=samples, fisher=fisher, norms=norms, config=config)
