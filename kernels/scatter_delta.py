"""``y = x Δᵀ`` for a sparse Δ with a fixed support and trained values (SHiRA, arXiv 2406.13175; SLTrain, 2406.02214).

The plain way writes Δ as a dense ``(n, k)`` matrix for every forward, and its backward writes a dense gradient to read
a few entries of it. Here only the entries are touched: with the tokens along the fast axis, an entry (o, i, v) is one
multiply-add of a run of row i of xᵀ into a run of row o of yᵀ. The three products walk the support by row (y), by
column (dx) and entry by entry (dv); each program owns what it writes, so nothing is added by atomics.

It pays while the tokens are few: the work is entries times tokens through the cache, whereas dense products run on the
tensor cores. ``benchmarks/results/kernels.json`` shows where the lines cross.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._dispatch import as_rows, check_tensor, is_traced, require, runs_triton

__all__ = ["Support", "scatter_delta", "scatter_delta_reference"]


@dataclass(frozen=True)
class Support:
    """Where the entries of Δ are; built once, on the device of the inputs.

    Attributes:
        positions: ``(e,)`` int64, row-major positions in ``(n, k)``, as given.
        shape: ``(n, k)``.
        row_start: ``(n + 1,)`` int32, entries of row o are ``row_start[o]`` to ``row_start[o + 1]``, by row.
        row_column: ``(e,)`` int32, their columns.
        row_entry: ``(e,)`` int32, their numbers among ``positions``.
        column_start: ``(k + 1,)`` int32, the same by column.
        column_row: ``(e,)`` int32.
        column_entry: ``(e,)`` int32.
    """

    positions: Tensor
    shape: tuple[int, int]
    row_start: Tensor
    row_column: Tensor
    row_entry: Tensor
    column_start: Tensor
    column_row: Tensor
    column_entry: Tensor

    @staticmethod
    def build(positions: Tensor, shape: tuple[int, int]) -> Support:
        """Sort ``positions`` by row and by column.

        Args:
            positions: ``(e,)`` int64, different from each other, in ``[0, n k)``.
            shape: ``(n, k)``.

        Raises:
            KernelArgumentError: positions are out of range, repeated, or none.
        """
        n, k = shape
        require(positions.dim() == 1 and positions.dtype == torch.int64, "positions must be int64 (e,)")
        require(1 <= positions.numel() < 2**31, f"got {positions.numel()} positions; expected 1 to 2^31 - 1")
        low, high = int(positions.min()), int(positions.max())
        require(low >= 0 and high < n * k, f"positions reach from {low} to {high}; expected 0 to {n * k - 1}")
        require(
            bool((torch.sort(positions).values.diff() > 0).all()),
            "positions are repeated; each entry may appear once",
        )
        row, column = positions // k, positions % k

        def walk(major: Tensor, minor: Tensor, count: int, other: int) -> tuple[Tensor, Tensor, Tensor]:
            order = torch.argsort(major * other + minor, stable=True)
            ends = torch.bincount(major, minlength=count).cumsum(0)
            start = torch.cat([ends.new_zeros(1), ends])
            return start.int(), minor[order].int(), order.int()

        return Support(positions, shape, *walk(row, column, n, k), *walk(column, row, k, n))


def scatter_delta_reference(x: Tensor, values: Tensor, support: Support) -> Tensor:
    """The same in plain torch, through the dense matrix; arguments as in ``scatter_delta``."""
    n, k = support.shape
    return x @ values.new_zeros(n * k).scatter(0, support.positions, values).view(n, k).T


def _forward(x: Tensor, values: Tensor, start: Tensor, column: Tensor, entry: Tensor) -> Tensor:
    """``(M, k)`` and the support by row -> ``(M, n)``."""
    from . import _scatter_triton as st

    out = x.new_empty(start.numel() - 1, x.shape[0])
    st.gather_rows(x.T.contiguous(), values, start, column, entry, out)
    return out.T.contiguous()


def _gradients(
    dy: Tensor, x: Tensor, values: Tensor, support: list[Tensor], need_x: bool, need_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to x and the values; ``support`` is column_start, column_row, column_entry, row_start, row_column,
    row_entry."""
    from . import _scatter_triton as st

    dy_t = dy.T.contiguous()
    dx = dv = None
    if need_x:
        dx_t = dy.new_empty(x.shape[1], x.shape[0])
        st.gather_rows(dy_t, values, support[0], support[1], support[2], dx_t)
        dx = dx_t.T.contiguous()
    if need_values:
        dv = torch.empty_like(values)
        st.entry_products(dy_t, x.T.contiguous(), support[3], support[4], support[5], dv)
    return dx, dv


@torch.library.custom_op("fednano::scatter_delta", mutates_args=())
def _forward_op(x: Tensor, values: Tensor, support: list[Tensor]) -> Tensor:
    return _forward(x, values, *support[3:])


@_forward_op.register_fake
def _(x: Tensor, values: Tensor, support: list[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], support[3].numel() - 1)


@torch.library.custom_op("fednano::scatter_delta_backward", mutates_args=())
def _backward_op(dy: Tensor, x: Tensor, values: Tensor, support: list[Tensor]) -> tuple[Tensor, Tensor]:
    dx, dv = _gradients(dy, x, values, support, True, True)
    assert dx is not None
    assert dv is not None
    return dx, dv


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, values: Tensor, support: list[Tensor]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], *inputs[2])


def _op_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | list[None], ...]:
    x, values, *support = ctx.saved_tensors
    dx, dv = _backward_op(dy, x, values, support)
    return dx, dv, [None] * 6


_forward_op.register_autograd(_op_backward, setup_context=_setup)


class _Function(torch.autograd.Function):
    """The same pair without the dispatcher's overhead, for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, *support: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, *support)
        return _forward(x, values, *support[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *support = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (*_gradients(grads[0], x, values, support, needs[0], needs[1]), *(None,) * 6)


def scatter_delta(x: Tensor, values: Tensor, support: Support) -> Tensor:
    """``x Δᵀ`` with ``Δ`` zero but for ``values`` at ``support``, differentiable once in x and the values.

    Args:
        x: ``(..., k)``, float32, bfloat16 or float16.
        values: ``(e,)``, dtype and device of x, in the order of ``support.positions``.
        support: from ``Support.build``.

    Returns:
        ``(..., n)``.

    Raises:
        KernelArgumentError: device, dtype or shape do not fit, or x is empty.
    """
    n, k = support.shape
    check_tensor("x", x)
    require(x.dim() >= 1 and x.shape[-1] == k, f"x has shape {tuple(x.shape)}; expected (..., {k})")
    require(x.numel() >= 1, f"x has shape {tuple(x.shape)}; expected at least one row")
    check_tensor("values", values, shape=(support.positions.numel(),), like=x)
    require(
        support.positions.device == x.device, f"support is on {support.positions.device}; expected {x.device}"
    )
    if not runs_triton(x):
        return scatter_delta_reference(x, values, support)
    walks = [
        support.column_start, support.column_row, support.column_entry,
        support.row_start, support.row_column, support.row_entry,
    ]  # fmt: skip
    rows, values = as_rows(x), values.contiguous()
    y: Tensor = _forward_op(rows, values, walks) if is_traced(x) else _Function.apply(rows, values, *walks)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], n)
