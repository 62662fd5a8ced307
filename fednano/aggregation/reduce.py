"""Reductions over a tensor whose bits do not depend on the number of threads.

A library may split a long reduction among threads, and another split rounds otherwise. Here each piece is short
enough for one thread, and the pieces are added exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["nonnegative_sum", "sum_of_squares"]

_PIECE = 32768  # elements; torch does not split a reduction of this size


def _vector(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat if flat.dtype in (torch.float32, torch.float64) else flat.float()


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(_vector(x), _PIECE)


def nonnegative_sum(x: Tensor) -> float:
    """Sum of the elements; NaN when one of them is negative, NaN or infinite.

    Args:
        x: any shape, any floating dtype.
    """
    flat = _vector(x)
    if flat.numel() == 0:
        return 0.0
    low = float(flat.numpy().min())  # NaN if any element is
    total = math.fsum(float(piece.sum()) for piece in _pieces(flat)) if low >= 0.0 else math.nan
    return total if math.isfinite(total) else math.nan


def sum_of_squares(x: Tensor) -> float:
    """Sum of the squared elements, in double precision; NaN or infinite when an element is.

    Args:
        x: any shape, any floating dtype.
    """
    return math.fsum(float(piece.double().square().sum()) for piece in _pieces(x))
