# ruff: noqa: PLR0912, PLR0915
# mypy: no-warn-unreachable, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One pass down to rank r and back up: ``out = [x +] f(x P) Q`` with P ``(k1, r)`` and Q ``(r, k2)``.

This one kernel is the forward of ``nano_adapter``, its gradient to the input (with P = Bᵀ, Q = Aᵀ), the same for many
clients at once, each with its own P and Q, and the low-rank branch of ``lora_linear``.
A program owns a block of rows. It sweeps their columns once to form ``x P``, applies f, and
sweeps back in the opposite order to form the output: the columns read last are the ones still in the cache.
Nothing is shared between programs, so a rerun gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv, next_power_of_2
from ._launch import Plan, plan
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
    bias,  # (k2,), unless RESIDUAL
    offsets,  # (clients + 1,), GROUPED only: client c owns rows offsets[c] to offsets[c + 1]
    ranks,  # (clients,), RANKED only: the columns of p in use
    M,
    clients,
    stride_x,
    stride_out,
    stride_pk,
    stride_pr,
    stride_qr,
    stride_qk,
    stride_pg,
    stride_qg,
    scale,
    K1: tl.constexpr,
    K2: tl.constexpr,
    R: tl.constexpr,
    MODE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EXPAND: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    rank = tl.arange(0, BLOCK_R)
    in_rank = rank < R
    if GROUPED:
        # Which client's which block is this? Every program counts the blocks of all clients, so nothing has to be read
        # by the host. Offsets that are not monotone are bent until they are: no access leaves the rows of x.
        c = tl.arange(0, BLOCK_C)
        low = tl.minimum(tl.maximum(tl.load(offsets + c, mask=c < clients, other=0).to(tl.int64), 0), M)
        high = tl.minimum(
            tl.maximum(tl.load(offsets + c + 1, mask=c < clients, other=0).to(tl.int64), low), M
        )
        blocks_of = tl.where(c < clients, (high - low + BLOCK_M - 1) // BLOCK_M, 0)
        upto = tl.cumsum(blocks_of, 0)
        client = tl.sum((upto <= tl.program_id(0)).to(tl.int32), 0)
        if client >= clients:
            return
        mine = c == client
        before = tl.sum(tl.where(mine, upto - blocks_of, 0), 0)
        first = tl.sum(tl.where(mine, low, 0), 0) + (tl.program_id(0) - before) * BLOCK_M
        end = tl.sum(tl.where(mine, high, 0), 0)
        p += client.to(tl.int64) * stride_pg
        q += client.to(tl.int64) * stride_qg
        if RANKED:
            in_rank = rank < tl.minimum(tl.load(ranks + client), R)
    else:
        first = tl.program_id(0).to(tl.int64) * BLOCK_M
        end = tl.cast(M, tl.int64)
    row = first + tl.arange(0, BLOCK_M)
    # Rows past the end read the last row instead of a masked nothing: the loads stay unmasked, the stores do not.
    safe = tl.minimum(row, end - 1)
    col = tl.arange(0, BLOCK_K)
    in_row = row < end
    in_width = rank < R

    x_tile = x + safe[:, None] * stride_x + col[None, :]
    p_tile = p + col[:, None] * stride_pk + rank[None, :] * stride_pr
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in tl.range(0, K1, BLOCK_K, num_stages=STAGES):
        if K1 % BLOCK_K == 0:
            xs = tl.load(x_tile + k, eviction_policy="evict_last")
            if BLOCK_R == R and not RANKED:
                ps = tl.load(p_tile + k * stride_pk)
            else:
                ps = tl.load(p_tile + k * stride_pk, mask=in_rank[None, :], other=0.0)
        else:
            inside = k + col < K1
            xs = tl.load(x_tile + k, mask=inside[None, :], other=0.0)
            ps = tl.load(p_tile + k * stride_pk, mask=inside[:, None] & in_rank[None, :], other=0.0)
        z = dot(xs, ps, z, PRECISION)

    small = safe[:, None] * R + rank[None, :]
    keep = in_row[:, None] & in_width[None, :]  # beyond a client's own rank these are zeros
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
                if BLOCK_R == R and not RANKED:
                    qs = tl.load(q_tile + k * stride_qk)
                else:
                    qs = tl.load(q_tile + k * stride_qk, mask=in_rank[:, None], other=0.0)
                if RESIDUAL:
                    xs = tl.load(x_tile + k, eviction_policy="evict_first")
                    o = dot(h, qs, xs.to(tl.float32), PRECISION)
                else:
                    o = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                    if BIAS:
                        o += tl.load(bias + k + col)[None, :].to(tl.float32)
                    o = dot(h, qs, o, PRECISION)
                tl.store(
                    o_tile + k,
                    narrow(o, out.dtype.element_ty, PRECISION),
                    mask=in_row[:, None],
                    eviction_policy="evict_first" if RESIDUAL else "",
                )
            else:
                inside = k + col < K2
                qs = tl.load(q_tile + k * stride_qk, mask=in_rank[:, None] & inside[None, :], other=0.0)
                if RESIDUAL:
                    xs = tl.load(x_tile + k, mask=inside[None, :], other=0.0)
                    o = dot(h, qs, xs.to(tl.float32), PRECISION)
                else:
                    o = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                    if BIAS:
                        o += tl.load(bias + k + col, mask=inside, other=0.0)[None, :].to(tl.float32)
                    o = dot(h, qs, o, PRECISION)
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


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which client."""

    offsets: Tensor  # (clients + 1,), int32 or int64, on the device of x
    ranks: Tensor | None = None  # (clients,), int32 or int64


def launch(
    x: Tensor, p: Tensor, q: Tensor, *, mode: int, scale: float, residual: bool, saved: Tensor, mid: Tensor,
    act: Tensor, out: Tensor | None, bias: Tensor | None = None, groups: Groups | None = None,
) -> None:  # fmt: skip
    """Run the kernel; ``out=None`` skips the second sweep.

    Args:
        x: ``(M, k1)``, unit stride along k1.
        p: ``(k1, r)``, with groups ``(clients, k1, r)``.
        q: ``(r, k2)``, with groups ``(clients, r, k2)``.
        mode: LINEAR, GELU, LINEAR_BACKWARD or GELU_BACKWARD.
        scale: factor of the low-rank part.
        residual: add x, needs k1 == k2.
        saved: ``(M, r)`` contiguous, written by the forward modes, read by GELU_BACKWARD.
        mid: ``(M, r)`` contiguous, written by the backward modes.
        act: ``(M, r)`` contiguous, written by GELU_BACKWARD.
        out: ``(M, k2)``, unit stride along k2.
        bias: ``(k2,)`` to add, without residual only.
        groups: rows of several clients, sorted by client.
    """
    if x.shape[0] == 0:
        return
    offsets = ranks = x
    if groups is not None:
        offsets = groups.offsets
        ranks = x if groups.ranks is None else groups.ranks
    target = x if out is None else out
    key = (
        "shrink_expand", mode, residual, out is None, bias is None, groups is None, x.dtype, offsets.dtype, ranks.dtype,
        ranks is x, x.device, x.shape, x.stride(), p.stride(), q.shape, q.stride(), target.stride(), offsets.shape,
    )  # fmt: skip

    def build() -> Plan:
        return _plan(x, p, q, mode, residual, target, out is not None, bias is not None, groups)

    plan(key, build)(
        (x, p, q, saved, mid, act, target, x if bias is None else bias, offsets, ranks), (scale,)
    )


def _plan(
    x: Tensor, p: Tensor, q: Tensor, mode: int, residual: bool, out: Tensor, expand: bool, bias: bool,
    groups: Groups | None,
) -> Plan:  # fmt: skip
    M, K1 = x.shape
    R, K2 = q.shape[-2:]
    way = "x" if not residual else "f" if mode < LINEAR_BACKWARD else "b"
    key = (
        f"{way}_k{_tuning.bucket(max(K1, K2))}_r{next_power_of_2(R)}_m{_tuning.bucket(M)}_{x.element_size()}"
    )
    fallback = heuristic(M, max(K1, K2), R, x.dtype, _tuning.multiprocessors(x.device))
    config = _tuning.choose("shrink_expand" if groups is None else "grouped", x.device, key, fallback)
    clients = 0 if groups is None else groups.offsets.numel() - 1
    return Plan(
        _kernel,
        # Every client can leave one block partly filled: that many more programs are enough for any offsets.
        (cdiv(M, config["BLOCK_M"]) + clients,),
        (
            M, clients, x.stride(0), out.stride(0), p.stride(-2), p.stride(-1), q.stride(-2), q.stride(-1),
            0 if groups is None else p.stride(0), 0 if groups is None else q.stride(0),
        ),
        {
            "K1": K1,
            "K2": K2,
            "R": R,
            "MODE": mode,
            "RESIDUAL": residual,
            "EXPAND": expand,
            "BIAS": bias,
            "GROUPED": groups is not None,
            "RANKED": groups is not None and groups.ranks is not None,
            "BLOCK_C": max(2, next_power_of_2(clients)),
            "BLOCK_M": config["BLOCK_M"],
            "BLOCK_K": config["BLOCK_K"],
            "BLOCK_R": max(16, next_power_of_2(R)),
            "PRECISION": precision(x),
            "STAGES": config["STAGES"],
        },
        config["num_warps"],
    )  # fmt: skip
