"""The loops over accumulators that numba compiles for the machine; `native` decides when they run.

One pass over memory does what `fixedpoint` does in four: it looks at each element, widens it, multiplies, rounds it to
the grid and adds it to the 64-bit accumulator. Only this module imports numba.

**The same bits as torch.** Where the processor has the instruction, ``torch.add(c, x, alpha=s)`` is one fused
multiply-add per element, and ``torch.addcmul(c, x, w, value=s)`` is ``fma(s * x, w, c)``: rounded once and twice. A
product rounded apart ends up one step beside it when it falls near the middle of two steps. Here the instruction is
therefore asked for by name; nothing else is contracted or reordered, since numba compiles without ``fastmath``.
`native.agrees` compares the two on the machine at hand.

**The largest absolute value** is found among bit patterns: without its sign bit, a pattern grows with the number it
stands for, infinity lies above every number and NaN above infinity. A maximum of integers is the same in any order, so
that it can be taken in vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float64, njit, types, uint64
from numba.extending import intrinsic

__all__ = ["compiled"]

_MAGIC = 1.5 * 2.0**52  # see `fixedpoint`
_KINDS = {"f": types.float32, "d": types.float64}


def _fused(context: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float64(types.float64, types.float64, types.float64), generate


def _magnitude(context: Any, x: Any) -> Any:
    word = types.uint32 if x == types.float32 else types.uint64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(word.bitwidth)
        return builder.and_(builder.bitcast(arguments[0], whole), whole((1 << word.bitwidth - 1) - 1))

    return word(x), generate


def _number(context: Any, word: Any) -> Any:
    double = word == types.uint64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if double:
            return builder.bitcast(arguments[0], ir.DoubleType())
        return builder.fpext(builder.bitcast(arguments[0], ir.FloatType()), ir.DoubleType())

    return types.float64(word), generate


def _pattern(context: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.uint64(types.float64), generate


fused = intrinsic(_fused)
magnitude = intrinsic(_magnitude)  # of a float32 or float64: its pattern without the sign, uint32 or uint64
number = intrinsic(_number)  # what a magnitude stands for, as float64
pattern = intrinsic(_pattern)  # of a float64


def _add(ring: Any, x: Any, scaled: Any, flip: Any) -> Any:
    """``ring += bits(C) + round(scaled * x)`` modulo 2**64.

    Args:
        ring: ``(n,)`` accumulators, uint64, changed in place.
        x: ``(n,)``, float32 or float64.
        scaled: the factor in steps.
        flip: 0, or 2**64 - 1 to subtract instead.

    Returns:
        The largest absolute value of x; infinite or NaN when an element is. What was added then must come off again.
    """
    if x.size == 0:
        return 0.0
    top = magnitude(x[0])
    for i in range(x.size):
        value = x[i]
        top = max(top, magnitude(value))
        ring[i] += (pattern(fused(scaled, float64(value), _MAGIC)) ^ flip) - flip  # -p is (p ^ ones) - ones
    return number(top)


def _add_pair(
    upper: Any, lower: Any, x: Any, w: Any, above: Any, below: Any, low: Any, high: Any, flip: Any
) -> Any:
    """``upper += bits(C) + round(above * x * w)`` and ``lower += bits(C) + round(below * w)``, with w clamped.

    Args:
        upper: ``(n,)`` accumulators, uint64, changed in place.
        lower: ``(n,)`` accumulators, uint64, changed in place.
        x: ``(n,)``, float32 or float64.
        w: ``(n,)``, float32 or float64, no NaN.
        above: the factor in steps of ``upper``.
        below: the factor in steps of ``lower``.
        low: lowest w, rounded to its dtype.
        high: highest w, rounded to its dtype.
        flip: as in `_add`.

    Returns:
        As `_add`.
    """
    if x.size == 0:
        return 0.0
    top = magnitude(x[0])
    for i in range(x.size):
        value, weight = x[i], w[i]
        top = max(top, magnitude(value))
        weight = weight if weight > low else low
        weight = weight if weight < high else high
        wide = float64(weight)
        upper[i] += (pattern(fused(above * float64(value), wide, _MAGIC)) ^ flip) - flip
        lower[i] += (pattern(fused(below, wide, _MAGIC)) ^ flip) - flip
    return number(top)


@functools.cache
def compiled(name: str, kinds: str) -> Callable[..., float]:
    """One loop for one combination of dtypes: from numba's cache on disk, or compiled now and put there.

    Args:
        name: "add" or "add_pair".
        kinds: NumPy's characters of the dtypes of x and, for a pair, w: "f" for float32, "d" for float64.
    """
    ring = uint64[::1]
    arrays = [_KINDS[kind][::1] for kind in kinds]
    loop: Callable[..., Any] = _add
    if name == "add":
        signature = types.float64(ring, *arrays, float64, uint64)
    else:
        clamp = _KINDS[kinds[1]]
        signature = types.float64(ring, ring, *arrays, float64, float64, clamp, clamp, uint64)
        loop = _add_pair
    try:
        made = njit(signature, nogil=True, cache=True)(loop)
    except (
        Exception
    ):  # the cache's: no folder that can be written to, a full disk, a file cut short (pickle's errors)
        made = njit(signature, nogil=True)(loop)
    call: Callable[..., float] = made
    return call
