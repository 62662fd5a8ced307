# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products with a sparse matrix; the tokens lie along the fast axis of every dense operand."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv, next_power_of_2
from ._launch import launch
from ._triton_common import narrow, precision


@triton.jit
def _gather_kernel(
    source,  # (rows, M)
    values,  # (e,)
    start,  # (targets + 1,)
    other,  # (e,) row of source
    entry,  # (e,) which value
    out,  # (targets, M)
    M,
    BLOCK_M: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, ENTRIES)
    inside = at < M
    begin = tl.load(start + target)
    end = tl.load(start + target + 1)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for e in range(begin, end, ENTRIES):
        here = e + lane < end
        row = tl.load(other + e + lane, mask=here, other=0).to(tl.int64)
        value = tl.load(values + tl.load(entry + e + lane, mask=here, other=0), mask=here, other=0.0).to(
            tl.float32
        )
        tile = tl.load(
            source + row[:, None] * M + at[None, :], mask=here[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(tile.to(tl.float32) * value[:, None], 0)
    tl.store(out + target * M + at, narrow(total, out.dtype.element_ty, PRECISION), mask=inside)


@triton.jit
def _entry_kernel(
    left,  # (n, M)
    right,  # (k, M)
    start,  # (n + 1,)
    column,  # (e,)
    entry,  # (e,)
    out,  # (e,)
    M,
    BLOCK_M: tl.constexpr,
    ENTRIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, ENTRIES)
    begin = tl.load(start + row)
    end = tl.load(start + row + 1)
    for e in range(begin, end, ENTRIES):
        here = e + lane < end
        col = tl.load(column + e + lane, mask=here, other=0).to(tl.int64)
        total = tl.zeros((ENTRIES, BLOCK_M), tl.float32)
        for m in range(0, M, BLOCK_M):
            at = m + tl.arange(0, BLOCK_M)
            inside = at < M
            ls = tl.load(left + row * M + at, mask=inside, other=0.0).to(tl.float32)
            rs = tl.load(
                right + col[:, None] * M + at[None, :], mask=here[:, None] & inside[None, :], other=0.0
            )
            total += rs.to(tl.float32) * ls[None, :]
        dv = narrow(tl.sum(total, 1), out.dtype.element_ty, PRECISION)
        tl.store(out + tl.load(entry + e + lane, mask=here, other=0), dv, mask=here)


def gather_rows(
    source: Tensor, values: Tensor, start: Tensor, other: Tensor, entry: Tensor, out: Tensor
) -> None:
    """``out[t] = Σ_e values[entry[e]] · source[other[e]]`` over the entries e of target t.

    Args:
        source: ``(rows, M)`` contiguous.
        values: ``(e,)``.
        start: ``(targets + 1,)`` int32.
        other: ``(e,)`` int32.
        entry: ``(e,)`` int32.
        out: ``(targets, M)`` contiguous.
    """
    M = source.shape[1]
    fallback = {"BLOCK_M": min(1024, max(16, next_power_of_2(M))), "ENTRIES": 8, "num_warps": 4}
    config = _tuning.choose(
        "scatter_gather", source.device, f"m{_tuning.bucket(M)}_{source.element_size()}", fallback
    )
    launch(
        _gather_kernel,
        (out.shape[0], cdiv(M, config["BLOCK_M"])),
        (source, values, start, other, entry, out),
        (M,),
        (),
        {"BLOCK_M": config["BLOCK_M"], "ENTRIES": config["ENTRIES"], "PRECISION": precision(source)},
        config["num_warps"],
    )


def entry_products(
    left: Tensor, right: Tensor, start: Tensor, column: Tensor, entry: Tensor, out: Tensor
) -> None:
    """``out[entry[e]] = left[row of e] · right[column[e]]`` for every entry e.

    Args:
        left: ``(n, M)`` contiguous.
        right: ``(k, M)`` contiguous.
        start: ``(n + 1,)`` int32, entries by row.
        column: ``(e,)`` int32.
        entry: ``(e,)`` int32.
        out: ``(e,)``.
    """
    M = left.shape[1]
    fallback = {"BLOCK_M": min(512, max(16, next_power_of_2(M))), "ENTRIES": 8, "num_warps": 4}
    config = _tuning.choose(
        "scatter_entry", left.device, f"m{_tuning.bucket(M)}_{left.element_size()}", fallback
    )
    launch(
        _entry_kernel,
        (left.shape[0],),
        (left, right, start, column, entry, out),
        (M,),
        (),
        {"BLOCK_M": config["BLOCK_M"], "ENTRIES": config["ENTRIES"], "PRECISION": precision(left)},
        config["num_warps"],
    )
