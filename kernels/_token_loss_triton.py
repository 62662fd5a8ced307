# ruff: noqa: PLR0915
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One program a row of logits: the loss, and the gradient written over the logits.

The first sweep keeps, lane by lane, a running maximum, a running sum of exponentials, and the strongest rival of the
label; the lanes are joined after it. The second sweep reads the row again, backwards, and writes dz over it. The label
and the rival are looked for only in the one tile that holds them. A row that fits one tile stays in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import next_power_of_2
from ._launch import Plan, plan
from ._triton_common import narrow, precision
from ._tuning import Config

_KINDS = {"cross_entropy": 0, "gradient_ascent": 1, "inverted_hinge": 2, "npo": 3}
LANES = 2048


@triton.jit
def _take(z, start, at, label, top, total, rival, rival_at, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Add one tile ``z`` (SUB, LANES), whose columns are ``start + at``, to the running values of the lanes."""
    highest = tl.max(z, 0)
    higher = tl.maximum(top, highest)
    # Lanes that have seen nothing yet have top = -inf; the difference of two infinities must not be formed.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    total = total * tl.exp2((top - shift) * 1.4426950408889634)
    total += tl.sum(tl.exp2((z - shift[None, :]) * 1.4426950408889634), 0)
    if KIND == 2:
        if (label >= start) & (label < start + BLOCK):
            highest = tl.max(tl.where(start + at == label, float("-inf"), z), 0)
        rival_at = tl.where(highest > rival, start, rival_at)
        rival = tl.maximum(rival, highest)
    return higher, total, rival, rival_at


@triton.jit
def _gradient(z, start, at, label, best_at, lse, a, b, c, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """``a p + b e_label + c e_best`` of one tile."""
    dz = a * tl.exp2((z - lse) * 1.4426950408889634)
    if (label >= start) & (label < start + BLOCK):
        dz += tl.where(start + at == label, b, 0.0)
    if KIND == 2:  # noqa: SIM102  (a constant, decided when compiled)
        if (best_at >= start) & (best_at < start + BLOCK):
            dz += tl.where(start + at == best_at, c, 0.0)
    return dz


@triton.jit
def _kernel(
    logits,  # (N, V), overwritten with dz
    labels,  # (N,) int64
    reference,  # (N,) float32, npo only
    losses,  # (N,) float32
    stride,
    V,
    beta,
    KIND: tl.constexpr,
    GRAD: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * stride
    label = tl.load(labels + row)
    at = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    low = float("-inf")

    top = tl.full((LANES,), low, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    rival = tl.full((LANES,), low, tl.float32)
    rival_at = tl.full((LANES,), 0, tl.int32)
    whole = V // BLOCK * BLOCK
    if not ONE_TILE:
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            z = tl.load(z_row + start + at, eviction_policy="evict_last").to(tl.float32)
            top, total, rival, rival_at = _take(z, start, at, label, top, total, rival, rival_at, KIND, BLOCK)
    else:
        whole = 0
    last = tl.load(z_row + whole + at, mask=whole + at < V, other=low)
    top, total, rival, rival_at = _take(
        last.to(tl.float32), whole, at, label, top, total, rival, rival_at, KIND, BLOCK
    )

    peak = tl.max(top, 0)
    norm = tl.sum(total * tl.exp2((top - peak) * 1.4426950408889634), 0)
    lse = peak + tl.log(norm)
    valid = (label >= 0) & (label < V)
    z_label = tl.load(z_row + label, mask=valid, other=low).to(tl.float32)
    log_p = z_label - lse

    best_at = tl.cast(-1, tl.int32)
    c = 0.0
    if KIND == 0:
        loss = -log_p
        a = 1.0
        b = -1.0
    elif KIND == 1:
        loss = log_p
        a = -1.0
        b = 1.0
    elif KIND == 2:
        best = tl.max(rival, 0)
        # Lanes know in which tile they saw it first. In the earliest of these, take the lowest column among equals:
        # the answer does not depend on the block size.
        # A row with NaN has no best; then the first tile is looked through in vain.
        tile = tl.min(tl.where(rival == best, rival_at, 2147483647), 0)
        tile = tl.where(tile < V, tile, 0)
        near = tl.load(z_row + tile + at, mask=tile + at < V, other=low).to(tl.float32)
        hit = (near == best) & (tile + at != label)
        best_at = tl.min(tl.min(tl.where(hit, tile + at, 2147483647), 1), 0)
        p_label = tl.exp(log_p)
        p_rival = tl.exp(best - lse)
        loss = 1.0 + p_label - p_rival
        a = p_rival - p_label
        b = p_label
        c = -p_rival
    else:
        gap = beta * (log_p - tl.load(reference + row).to(tl.float32))
        # Softplus and sigmoid by exp(-|gap|), which cannot overflow.
        small = tl.exp(-tl.abs(gap))
        loss = 2.0 / beta * (tl.maximum(gap, 0.0) + tl.log(1.0 + small))
        weight = 2.0 * tl.where(gap >= 0.0, 1.0, small) / (1.0 + small)
        a = -weight
        b = weight
    if not valid:
        loss = 0.0
        a = 0.0
        b = 0.0
        c = 0.0
    if GRAD:
        # Every warp has read the label's logit, and the warp that it belongs to writes a gradient over it: none may
        # write before all have read. (In the interpreter a barrier does nothing.)
        tl.debug_barrier()
    tl.store(losses + row, loss)

    if GRAD:
        dz = _gradient(last.to(tl.float32), whole, at, label, best_at, lse, a, b, c, KIND, BLOCK)
        tl.store(z_row + whole + at, narrow(dz, logits.dtype.element_ty, PRECISION), mask=whole + at < V)
        if not ONE_TILE:
            # Against the direction of the first sweep: the end of the row is the part still in the cache.
            tiles = V // BLOCK
            for i in tl.range(0, tiles, num_stages=STAGES):
                start = (tiles - 1 - i) * BLOCK
                z = tl.load(z_row + start + at, eviction_policy="evict_first").to(tl.float32)
                dz = _gradient(z, start, at, label, best_at, lse, a, b, c, KIND, BLOCK)
                stored = narrow(dz, logits.dtype.element_ty, PRECISION)
                tl.store(z_row + start + at, stored, eviction_policy="evict_first")


def heuristic(V: int, itemsize: int) -> Config:
    """Block size for a card that is not in the table."""
    if V <= 32768 and itemsize == 2:
        return {"BLOCK": max(16, next_power_of_2(V)), "num_warps": 16 if V > 8192 else 4, "STAGES": 1}
    return {"BLOCK": 8192, "num_warps": 16, "STAGES": 2}


def losses_and_gradients(
    logits: Tensor, labels: Tensor, reference: Tensor | None, objective: str, beta: float, need_grad: bool
) -> Tensor:
    """Losses ``(N,)`` float32 of ``logits`` ``(N, V)``, which become dz if asked for.

    Args:
        logits: unit stride along V; overwritten when ``need_grad``.
        labels: ``(N,)`` int64.
        reference: ``(N,)`` for npo.
        objective: one of the four names.
        beta: temperature of npo.
        need_grad: whether to form dz.
    """
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    labels = labels.contiguous()
    aside = labels if reference is None else reference.contiguous()

    def build() -> Plan:
        size = logits.element_size()
        name = f"v{_tuning.bucket(V)}_{objective}_{size}"
        config = _tuning.choose("token_loss", logits.device, name, heuristic(V, size))
        constants = {
            "KIND": _KINDS[objective],
            "GRAD": need_grad,
            "ONE_TILE": config["BLOCK"] >= V,
            "BLOCK": config["BLOCK"],
            "LANES": min(config["BLOCK"], config["num_warps"] * 256),
            "PRECISION": precision(logits),
            "STAGES": config["STAGES"],
        }
        return Plan(_kernel, (N,), (logits.stride(0), V), constants, config["num_warps"])

    key = (
        "token_loss",
        objective,
        need_grad,
        logits.dtype,
        aside.dtype,
        logits.device,
        logits.shape,
        logits.stride(),
    )
    plan(key, build)((logits, labels, aside, losses), (beta,))
    return losses
