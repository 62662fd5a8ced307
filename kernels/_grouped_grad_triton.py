# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gradients of every client's thin matrices over rows that are sorted by client."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv, next_power_of_2
from ._launch import launch
from ._triton_common import dot, narrow, precision
from ._weight_grad_triton import Product


@triton.jit
def _segment(
    big, small, out, begin, end, client, scale,
    stride_big, stride_small, stride_og, stride_ok, stride_or,
    K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    lane = tl.arange(0, BLOCK_M)
    in_k = k < K
    in_rank = rank < R
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for offset in tl.range(0, end - begin, BLOCK_M, num_stages=STAGES):
        row = begin + offset + lane
        safe = tl.minimum(row, end - 1)
        bigs = tl.load(big + safe[:, None] * stride_big + k[None, :], mask=in_k[None, :], other=0.0)
        inside = (row < end)[:, None] & in_rank[None, :]
        smalls = tl.load(small + safe[:, None] * stride_small + rank[None, :], mask=inside, other=0.0)
        acc = dot(tl.trans(bigs), smalls, acc, PRECISION)
    target = out + client.to(tl.int64) * stride_og + k[:, None] * stride_ok + rank[None, :] * stride_or
    tl.store(
        target, narrow(acc * scale, out.dtype.element_ty, PRECISION), mask=in_k[:, None] & in_rank[None, :]
    )


@triton.jit
def _grouped_kernel(
    big0, small0, out0, big1, small1, out1, offsets, M,
    stride_big0, stride_small0, stride_og0, stride_ok0, stride_or0,
    stride_big1, stride_small1, stride_og1, stride_ok1, stride_or1, scale0, scale1,
    K: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program owns a slice of one client's gradient, so an empty client gets zeros, and nothing is added up later.
    client = tl.program_id(0)
    begin = tl.minimum(tl.maximum(tl.load(offsets + client).to(tl.int64), 0), M)
    end = tl.minimum(tl.maximum(tl.load(offsets + client + 1).to(tl.int64), begin), M)
    if tl.program_id(2) == 0:
        _segment(
            big0, small0, out0, begin, end, client, scale0,
            stride_big0, stride_small0, stride_og0, stride_ok0, stride_or0,
            K, R, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _segment(
            big1, small1, out1, begin, end, client, scale1,
            stride_big1, stride_small1, stride_og1, stride_ok1, stride_or1,
            K, R, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION, STAGES,
        )  # fmt: skip


def gradients_by_client(first: Product, second: Product, offsets: Tensor) -> None:
    """Write two gradients for every client; ``out`` of each product is ``(clients, k, r)`` with any strides.

    Args:
        first: rows sorted by client.
        second: the same rows, k and r.
        offsets: ``(clients + 1,)`` on the device.
    """
    M, K = first.big.shape
    R = first.small.shape[1]
    clients = offsets.numel() - 1
    wide = first.big.dtype != torch.float32
    block_k = min(128, 8192 // max(16, next_power_of_2(R)), max(16, next_power_of_2(K))) if wide else 32
    fallback = {"BLOCK_M": 64 if wide else 16, "BLOCK_K": block_k, "num_warps": 4, "STAGES": 3}
    key = f"k{_tuning.bucket(K)}_r{next_power_of_2(R)}_m{_tuning.bucket(M)}_c{_tuning.bucket(clients)}"
    key += f"_{first.big.element_size()}"
    config = _tuning.choose("grouped_grad", first.big.device, key, fallback)
    launch(
        _grouped_kernel,
        (clients, cdiv(K, config["BLOCK_K"]), 2),
        (first.big, first.small, first.out, second.big, second.small, second.out, offsets),
        (
            M, first.big.stride(0), first.small.stride(0), *first.out.stride(),
            second.big.stride(0), second.small.stride(0), *second.out.stride(),
        ),
        (first.scale, second.scale),
        {
            "K": K, "R": R, "BLOCK_M": config["BLOCK_M"], "BLOCK_K": config["BLOCK_K"],
            "BLOCK_R": max(16, next_power_of_2(R)), "PRECISION": precision(first.big), "STAGES": config["STAGES"],
        },
        config["num_warps"],
    )  # fmt: skip
