# ruff: noqa: PLR0915
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""One program a row of logits: the loss, and the gradient written over the logits.

The first sweep keeps, lane by lane, a running maximum, a running sum of exponentials, and the strongest rival of the
label; the lanes are joined after it. The second sweep reads the row again (from the cache) and writes dz over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import next_power_of_2, on_device
from ._triton_common import narrow, precision
from ._tuning import Config

_KINDS = {"cross_entropy": 0, "gradient_ascent": 1, "inverted_hinge": 2, "npo": 3}


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
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * stride
    label = tl.load(labels + row)
    lane = tl.arange(0, BLOCK)
    low = float("-inf")

    top = tl.full((BLOCK,), low, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    rival = tl.full((BLOCK,), low, tl.float32)
    rival_at = tl.full((BLOCK,), 0, tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        col = start + lane
        z = tl.load(z_row + col, mask=col < V, other=low).to(tl.float32)
        higher = tl.maximum(top, z)
        # Lanes that have seen nothing yet have top = -inf; the difference of two infinities must not be formed.
        shift = tl.where(higher == low, 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(z - shift)
        top = higher
        if KIND == 2:
            other = tl.where(col == label, low, z)
            rival_at = tl.where(other > rival, col, rival_at)
            rival = tl.maximum(rival, other)
    peak = tl.max(top, 0)
    norm = tl.sum(total * tl.exp(top - peak), 0)
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
        # The lowest index among equals, whatever the block size.
        best_at = tl.min(tl.where(rival == best, rival_at, 2147483647), 0)
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
    tl.store(losses + row, loss)

    if GRAD:
        # Against the direction of the first sweep: the end of the row is the part still in the cache.
        blocks = tl.cdiv(V, BLOCK)
        for i in tl.range(0, blocks, num_stages=STAGES):
            col = (blocks - 1 - i) * BLOCK + lane
            z = tl.load(z_row + col, mask=col < V, other=low).to(tl.float32)
            dz = a * tl.exp(z - lse)
            dz += tl.where(col == label, b, 0.0)
            if KIND == 2:
                dz += tl.where(col == best_at, c, 0.0)
            tl.store(z_row + col, narrow(dz, logits.dtype.element_ty, PRECISION), mask=col < V)


def heuristic(V: int, itemsize: int) -> Config:
    """Block size for a card that is not in the table."""
    return {
        "BLOCK": min(4096, max(16, next_power_of_2(V))),
        "num_warps": 8 if itemsize == 2 else 16,
        "STAGES": 2,
    }


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
    size = logits.element_size()
    key = f"v{_tuning.bucket(V)}_{objective}_{size}"
    config = _tuning.choose("token_loss", logits.device, key, heuristic(V, size))
    with on_device(logits):
        _kernel[(N,)](
            logits,
            labels.contiguous(),
            labels if reference is None else reference.contiguous(),
            losses,
            logits.stride(0),
            V,
            beta,
            KIND=_KINDS[objective],
            GRAD=need_grad,
            BLOCK=config["BLOCK"],
            PRECISION=precision(logits),
            STAGES=config["STAGES"],
            num_warps=config["num_warps"],
        )
    return losses
