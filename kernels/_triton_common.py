# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""What the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, bfloat16, float32


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a b + acc`` in float32. The interpreter holds bfloat16 as raw bits, so there the operands are widened first."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if PRECISION == "ieee":
        # A sum of blocks errs less than one long chain of additions, which is what these products otherwise are.
        # Subtracted, because the compiler makes a chain again of a product that is added.
        return acc - tl.dot(-a, b, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(v, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Float32 ``v`` rounded to the nearest ``dtype``; the interpreter by itself would cut bfloat16 off."""
    if PRECISION == "widen" and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        v = bits.to(tl.float32, bitcast=True)
    return v.to(dtype)


def precision(tensor: Tensor) -> str:
    """How ``dot`` multiplies: float32 stays float32, never tf32."""
    if tensor.dtype == float32:
        return "ieee"
    return "widen" if tensor.dtype == bfloat16 and tensor.device.type == "cpu" else "tf32"
