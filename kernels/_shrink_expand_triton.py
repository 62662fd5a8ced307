# ruff: noqa: PLR0912, PLR0915
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One pass down to rank r and back up: ``out = [x +] f(x P) Q`` with P ``(k1, r)`` and Q ``(r, k2)``.

This one kernel is the forward of ``nano_adapter``, its gradient to the input (with P = Bᵀ, Q = Aᵀ), and the low-rank
branch of ``lora_linear``. A program owns a block of rows. It sweeps their columns once to form ``x P``, applies f, and
sweeps back in the opposite order to form the output: the columns read last are the ones still in the cache.
Nothing is shared between programs, so a rerun gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv, next_power_of_2, on_device
from ._triton_common import dot, narrow, precision
from ._tuning import Config

# What f does between the two sweeps.
LINEAR, GELU, LINEAR_BACKWARD, GELU_BACKWARD = 0, 1, 2, 3


@triton.jit
def _kernel(
    x,  # (M, k1)
    p,  # (k1, r), any strides
    q,  # (r, k2), any strides
    saved,  # (M, r): forward writes x P here; the GELU backward reads it
    mid,  # (M, r): backward writes f(x P), the gradient at the pre-activation
    act,  # (M, r): the GELU backward writes gelu(saved)
    out,  # (M, k2)
    M,
    scale,
    stride_x,
    stride_out,
    stride_pk,
    stride_pr,
    stride_qr,
    stride_qk,
    K1: tl.constexpr,
    K2: tl.constexpr,
    R: tl.constexpr,
    MODE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EXPAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    # Rows past the end read the last row instead of a masked nothing: the loads stay unmasked, the stores do not.
    safe = tl.minimum(row, M - 1)
    col = tl.arange(0, BLOCK_K)
    rank = tl.arange(0, BLOCK_R)
    in_rank = rank < R
    in_row = row < M

    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    x_tile = x + safe[:, None] * stride_x + col[None, :]
    p_tile = p + col[:, None] * stride_pk + rank[None, :] * stride_pr
    for k in tl.range(0, K1, BLOCK_K, num_stages=STAGES):
        if K1 % BLOCK_K == 0:
            xs = tl.load(x_tile + k, eviction_policy="evict_last")
            if BLOCK_R == R:
                ps = tl.load(p_tile + k * stride_pk)
            else:
                ps = tl.load(p_tile + k * stride_pk, mask=in_rank[None, :], other=0.0)
        else:
            inside = k + col < K1
            xs = tl.load(x_tile + k, mask=inside[None, :], other=0.0)
            ps = tl.load(p_tile + k * stride_pk, mask=inside[:, None] & in_rank[None, :], other=0.0)
        z = dot(xs, ps, z, PRECISION)

    small = safe[:, None] * R + rank[None, :]
    keep = in_row[:, None] & in_rank[None, :]
    if MODE == 0:
        tl.store(saved + small, narrow(z, saved.dtype.element_ty, PRECISION), mask=keep)
        h = z * scale
    elif MODE == 1:
        tl.store(saved + small, narrow(z, saved.dtype.element_ty, PRECISION), mask=keep)
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476)) * scale
    elif MODE == 2:
        h = z * scale
        tl.store(mid + small, narrow(h, mid.dtype.element_ty, PRECISION), mask=keep)
    else:
        pre = tl.load(saved + small, mask=in_rank[None, :], other=0.0).to(tl.float32)
        cdf = 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476))
        slope = cdf + pre * 0.3989422804014327 * tl.exp(-0.5 * pre * pre)
        h = z * slope * scale
        tl.store(mid + small, narrow(h, mid.dtype.element_ty, PRECISION), mask=keep)
        tl.store(act + small, narrow(pre * cdf, act.dtype.element_ty, PRECISION), mask=keep)

    if EXPAND:
        h = narrow(h, x.dtype.element_ty, PRECISION)
        q_tile = q + rank[:, None] * stride_qr + col[None, :] * stride_qk
        o_tile = out + row[:, None] * stride_out + col[None, :]
        blocks: tl.constexpr = (K2 + BLOCK_K - 1) // BLOCK_K
        for i in tl.range(0, blocks, num_stages=STAGES):
            k = (blocks - 1 - i) * BLOCK_K
            if K2 % BLOCK_K == 0:
                if BLOCK_R == R:
                    qs = tl.load(q_tile + k * stride_qk)
                else:
                    qs = tl.load(q_tile + k * stride_qk, mask=in_rank[:, None], other=0.0)
                if RESIDUAL:
                    xs = tl.load(x_tile + k, eviction_policy="evict_first")
                    o = dot(h, qs, xs.to(tl.float32), PRECISION)
                else:
                    o = dot(h, qs, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION)
                tl.store(
                    o_tile + k,
                    narrow(o, out.dtype.element_ty, PRECISION),
                    mask=in_row[:, None],
                    eviction_policy="evict_first",
                )
            else:
                inside = k + col < K2
                qs = tl.load(q_tile + k * stride_qk, mask=in_rank[:, None] & inside[None, :], other=0.0)
                if RESIDUAL:
                    xs = tl.load(x_tile + k, mask=inside[None, :], other=0.0)
                    o = dot(h, qs, xs.to(tl.float32), PRECISION)
                else:
                    o = dot(h, qs, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PRECISION)
                tl.store(
                    o_tile + k,
                    narrow(o, out.dtype.element_ty, PRECISION),
                    mask=in_row[:, None] & inside[None, :],
                )


def heuristic(M: int, K: int, R: int, dtype: torch.dtype, sms: int) -> Config:
    """Block sizes for a card that is not in the table."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_K": 32, "num_warps": 4, "STAGES": 2}
    block_m = 16
    while block_m < (64 if R > 32 else 32) and cdiv(M, block_m * 2) >= sms:
        block_m *= 2
    return {"BLOCK_M": block_m, "BLOCK_K": min(128, max(16, next_power_of_2(K))), "num_warps": 4, "STAGES": 3}


def launch(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    *,
    mode: int,
    scale: float,
    residual: bool,
    saved: Tensor,
    mid: Tensor,
    act: Tensor,
    out: Tensor | None,
) -> None:
    """Run the kernel; ``out=None`` skips the second sweep.

    Args:
        x: ``(M, k1)``, unit stride along k1.
        p: ``(k1, r)``.
        q: ``(r, k2)``.
        mode: LINEAR, GELU, LINEAR_BACKWARD or GELU_BACKWARD.
        scale: factor of the low-rank part.
        residual: add x, needs k1 == k2.
        saved: ``(M, r)`` contiguous, written by the forward modes, read by GELU_BACKWARD.
        mid: ``(M, r)`` contiguous, written by the backward modes.
        act: ``(M, r)`` contiguous, written by GELU_BACKWARD.
        out: ``(M, k2)``, unit stride along k2.
    """
    M, K1 = x.shape
    R, K2 = q.shape
    if M == 0:
        return
    way = "x" if not residual else "f" if mode < LINEAR_BACKWARD else "b"
    key = (
        f"{way}_k{_tuning.bucket(max(K1, K2))}_r{next_power_of_2(R)}_m{_tuning.bucket(M)}_{x.element_size()}"
    )
    fallback = heuristic(M, max(K1, K2), R, x.dtype, _tuning.multiprocessors(x.device))
    config = _tuning.choose("shrink_expand", x.device, key, fallback)
    target = out if out is not None else x
    with on_device(x):
        _kernel[(cdiv(M, config["BLOCK_M"]),)](
            x,
            p,
            q,
            saved,
            mid,
            act,
            target,
            M,
            scale,
            x.stride(0),
            target.stride(0),
            p.stride(0),
            p.stride(1),
            q.stride(0),
            q.stride(1),
            K1=K1,
            K2=K2,
            R=R,
            MODE=mode,
            RESIDUAL=residual,
            EXPAND=out is not None,
            BLOCK_M=config["BLOCK_M"],
            BLOCK_K=config["BLOCK_K"],
            BLOCK_R=max(16, next_power_of_2(R)),
            PRECISION=precision(x),
            STAGES=config["STAGES"],
            num_warps=config["num_warps"],
        )
