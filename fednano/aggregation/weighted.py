"""Two sums in one walk: weighted terms and their weights, as Fisher merging wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fednano.aggregation import native
from fednano.aggregation.chunks import CHUNK, SCRATCH, U64
from fednano.aggregation.fixedpoint import MAGIC, MINUS, PLUS, FixedSum, check_values

__all__ = ["add_weighted"]


def add_weighted(
    numerator: FixedSum,
    denominator: FixedSum,
    values: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    factors: Mapping[str, float],
    clamps: Mapping[str, tuple[float, float]],
    limit: float,
) -> None:
    """Add ``f w x`` to one sum and ``f w`` to another in one walk, with ``w`` clamped: all of it or nothing.

    The caller vouches for the bounds: ``f * clamp <= denominator.grid.bound`` and ``f * clamp * limit <=
    numerator.grid.bound``.

    Args:
        numerator: accumulator of ``f w x``.
        denominator: accumulator of ``f w``, of the same shapes.
        values: x, name to tensor.
        weights: w, the same shapes, no NaN.
        factors: f, name to a finite number.
        clamps: name to lowest and highest w.
        limit: on the absolute values of x.

    Raises:
        Refusal: as `FixedSum.add`.
    """
    numerator.require_room()
    terms = []
    for name in numerator.order():
        factor, (low, high) = factors[name], clamps[name]
        top = torch.finfo(
            weights[name].dtype
        ).max  # a clamp beyond it clamps nothing, and cannot be written in the dtype
        above = math.ldexp(factor, -numerator.grid.exponent)
        below = math.ldexp(factor, -denominator.grid.exponent)
        terms.append(_Term(name, above, below, min(low, top), min(high, top)))
    if not _add_compiled(numerator, denominator, values, weights, terms, limit):
        xs, ws = numerator.flat(values), denominator.flat(weights)
        for x in xs.values():  # before anything is added, so nothing has to be taken off
            check_values(x, limit)
        for term in terms:
            up, down = numerator.ring[term.name], denominator.ring[term.name]
            _add_by_torch(up, down, xs[term.name], ws[term.name], term)
    numerator.count += 1
    denominator.count += 1


class _Term(NamedTuple):
    """What is done with one leaf: factors in steps of both sums, and the clamp of w."""

    name: str
    above: float
    below: float
    low: float
    high: float


def _add_compiled(
    numerator: FixedSum,
    denominator: FixedSum,
    values: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    terms: list[_Term],
    limit: float,
) -> bool:
    """Add in one pass, if this can be done here and now: see `native`."""
    if not native.chosen(2 * numerator.numel):
        return False
    work = []
    for name, *numbers in terms:
        x, w = native.vector(values[name]), native.vector(weights[name])
        up, down = numerator.ring[name], denominator.ring[name]
        if x is None or w is None or not x.size == w.size == up.size:
            return False
        loop = native.loop_for("add_pair", x, w)
        if loop is None:
            return False
        work.append((loop, (up, down, x, w, *numbers)))
    for done, (loop, arguments) in enumerate(work):
        if not loop(*arguments, PLUS) <= limit:
            # Integers: taking off what was added restores the bits. Torch then says what is wrong.
            for again, before in work[: done + 1]:
                again(*before, MINUS)
            return False
    return True


def _add_by_torch(upper: U64, lower: U64, x: Tensor, w: Tensor, term: _Term) -> None:
    for start in range(0, upper.size, CHUNK):
        part = slice(start, start + CHUNK)
        up, down, some = upper[part], lower[part], w[part]
        first, second = SCRATCH.view("first", up.size), SCRATCH.view("second", up.size)
        bits = SCRATCH.bits(up.size)
        if w.dtype == torch.float32:
            narrow = SCRATCH.view("narrow", up.size, torch.float32)
            second.copy_(torch.clamp(some, term.low, term.high, out=narrow))
        else:
            torch.clamp(some.double(), term.low, term.high, out=second)
        first.copy_(x[part])
        torch.addcmul(MAGIC, first, second, value=term.above, out=first)
        np.add(up, bits, out=up)
        torch.add(MAGIC, second, alpha=term.below, out=first)
        np.add(down, bits, out=down)
