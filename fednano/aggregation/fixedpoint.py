"""Sums that do not depend on the order of their terms: fixed point in the ring of 64-bit integers.

Floating-point addition does not associate, so a server that adds replies as they arrive would get other bits at
each run. Here every term ``factor * x`` is rounded once to a multiple of a power of two, the *step*, shared by all
clients, and the multiples are added as 64-bit integers. Integer addition modulo 2**64 is exact, associative and
commutative: any order, any grouping and any partial sums of two servers give the same bits. It is also the ring
in which secure aggregation masks.

**No overflow.** Let ``|factor * x| <= bound`` for every admitted term, N = ``clients`` the number of admitted terms,
and ``b = min(51, 62 - ceil(log2 N))`` the bits of a term. The step is the power of two
``2**(ceil(log2 bound) - b)``, so a term is at most ``bound / step <= 2**b`` steps, and rounding to the nearest
integer cannot pass the integer ``2**b``. The sum of at most N terms is at most ``N * 2**b <= 2**ceil(log2 N) *
2**(62 - ceil(log2 N)) = 2**62 < 2**63`` steps in absolute value, as is every partial sum. Hence the signed
reading of the 64-bit result is the exact sum. `FixedSum.add` enforces both premises: it checks the bound on
every element and counts its terms.

**Rounding without a conversion instruction.** A double v with ``|v| <= 2**51`` is rounded to an integer by adding
``C = 1.5 * 2**52``: v + C lies in [2**52, 2**53], where doubles are the integers, and their bit patterns, read
as integers, are ``bits(C) + round(v)``. So the pattern itself is added to the accumulator, and ``count *
bits(C)`` is taken off at the end, modulo 2**64. That is why b is at most 51.

**Precision.** Each term is off by at most one step (half a step from rounding to the grid, at most a quarter from
rounding ``factor * x`` to a double). The weighted mean of n terms is therefore off by at most ``n * step /
sum(factors)`` plus one rounding to the leaf's dtype.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fednano.aggregation import native
from fednano.aggregation.chunks import CHUNK, SCRATCH, U64, zeros
from fednano.aggregation.update import Refusal
from fednano.errors import ConfigError

__all__ = ["MAGIC", "MINUS", "PLUS", "FixedSum", "Grid", "check_values"]

_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = int(np.float64(_MAGIC).view(np.uint64))
MAGIC = torch.tensor(_MAGIC, dtype=torch.float64)
_RING = 1 << 64
_LARGEST = sys.float_info.max
PLUS, MINUS = np.uint64(0), np.uint64(_RING - 1)
_PIECE = 16384  # elements read out at a time: their temporaries count in the peak of memory


@dataclass(frozen=True)
class Grid:
    """The shared exponent: terms are multiples of ``2**exponent`` and at most ``2**bits`` of them.

    Attributes:
        exponent: of the step.
        bits: of a term, without its sign.
        clients: number of terms for which overflow is proven impossible.
    """

    exponent: int
    bits: int
    clients: int

    @classmethod
    def covering(cls, bound: float, clients: int) -> Grid:
        """The finest grid on which ``clients`` terms of absolute value up to ``bound`` cannot overflow.

        Raises:
            ConfigError: bound not positive and finite, or clients not in 1 .. 2**40.
        """
        if not (math.isfinite(bound) and bound > 0.0):
            raise ConfigError(f"fixed point: got bound {bound}, expected a positive finite number")
        if not 1 <= clients <= 1 << 40:
            raise ConfigError(f"fixed point: got {clients} clients, expected 1 to 2**40")
        mantissa, exponent = math.frexp(bound)  # bound = mantissa * 2**exponent, mantissa in [0.5, 1)
        top = exponent - 1 if mantissa == 0.5 else exponent
        bits = min(51, 62 - (clients - 1).bit_length())
        return cls(exponent=top - bits, bits=bits, clients=clients)

    @property
    def step(self) -> float:
        """Distance between neighbouring values."""
        return math.ldexp(1.0, self.exponent)

    @property
    def bound(self) -> float:
        """Largest absolute value of a term."""
        return math.ldexp(1.0, self.exponent + self.bits)


class FixedSum:
    """A running sum ``sum_k factor_k * x_k`` over named tensors, exact on its grid.

    Memory: 8 bytes an element, whatever the number of terms, and buffers of `CHUNK` elements per thread.
        Successive terms
    walk the chunks in opposite directions, so that half of the accumulator is still in the cache when the next
    starts.

    Args:
        grid: the shared exponent.
        shapes: name to shape of each tensor.
    """

    def __init__(self, grid: Grid, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.grid = grid
        self.shapes = dict(shapes)
        self.count = 0
        self.numel = sum(math.prod(s) for s in self.shapes.values())
        self.ring: dict[str, U64] = {k: zeros(math.prod(s)) for k, s in self.shapes.items()}
        self._pieces: dict[str, list[U64]] = {
            name: [ring[start : start + CHUNK] for start in range(0, ring.size, CHUNK)]
            for name, ring in self.ring.items()
        }

    def add(self, values: Mapping[str, Tensor], factor: float) -> None:
        """Add ``factor * values``: all of it or, when refused, nothing of it.

        Args:
            values: name to tensor; names and shapes as at construction, any floating dtype.
            factor: finite.

        Raises:
            Refusal: "capacity" after ``grid.clients`` terms; "schema" when a tensor has another size; "nonfinite" or
                "norm" when a term exceeds the grid's bound.
        """
        self.require_room()
        limit = self.limit(factor)
        scaled = math.ldexp(factor, -self.grid.exponent)
        if not self._add_compiled(values, scaled, limit):
            self._add_by_torch(self.flat(values), scaled, limit)
        self.count += 1

    def _add_compiled(self, values: Mapping[str, Tensor], scaled: float, limit: float) -> bool:
        """Add in one pass, if this can be done here and now: see `native`."""
        if not native.chosen(self.numel):
            return False
        work = []
        for name in self.order():
            x, ring = native.vector(values[name]), self.ring[name]
            loop = None if x is None or x.size != ring.size else native.loop_for("add", x)
            if loop is None:
                return False
            work.append((loop, ring, x))
        for done, (loop, ring, x) in enumerate(work):
            if not loop(ring, x, scaled, PLUS) <= limit:
                # Integers: taking off what was added restores the bits. Torch then says what is wrong.
                for again, restored, y in work[: done + 1]:
                    again(restored, y, scaled, MINUS)
                return False
        return True

    def _add_by_torch(self, flat: Mapping[str, Tensor], scaled: float, limit: float) -> None:
        done: list[str] = []
        for name in self.order():
            x = flat[name]
            try:
                check_values(x, limit)  # just before it is used, while it is in the cache
            except Refusal:
                for undo in done:
                    self._combine(np.subtract, undo, flat[undo], scaled)
                raise
            self._combine(np.add, name, x, scaled)
            done.append(name)

    def remove(self, values: Mapping[str, Tensor], factor: float) -> None:
        """Take off what `add` put in with the same arguments; the bits become what they were."""
        flat, scaled = self.flat(values), math.ldexp(factor, -self.grid.exponent)
        for name, x in flat.items():
            self._combine(np.subtract, name, x, scaled)
        self.count -= 1

    def _combine(self, operation: np.ufunc, name: str, x: Tensor, scaled: float) -> None:
        start = 0
        for ring in self._pieces[name]:
            size = ring.size
            operation(ring, _pattern(x[start : start + size] if size < x.numel() else x, scaled), out=ring)
            start += size

    def require_room(self) -> None:
        """Refusal when the grid admits no further term."""
        if self.count >= self.grid.clients:
            raise Refusal(
                "capacity", f"the accumulators admit {self.grid.clients} updates; raise max_clients"
            )

    def flat(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as vectors; Refusal when one has another size."""
        out = {}
        for name, ring in self.ring.items():
            out[name] = values[name].detach().reshape(-1)
            if out[name].numel() != ring.size:
                raise Refusal("schema", f"leaf {name} has {out[name].numel()} elements, expected {ring.size}")
        return out

    def limit(self, factor: float) -> float:
        """Largest absolute value that fits on the grid once multiplied by ``factor``; never infinite."""
        if not math.isfinite(factor):
            raise Refusal("weight", f"got a factor of {factor}, expected a finite number")
        return min(self.grid.bound / abs(factor), _LARGEST) if factor else _LARGEST

    def order(self) -> list[str]:
        """The leaves, in the direction of this term."""
        return list(reversed(self.shapes)) if self.count % 2 else list(self.shapes)

    def integers(self) -> dict[str, Tensor]:
        """The sums in steps, ``int64``, shaped as at construction: the elements that secure aggregation masks."""
        offset = np.uint64((self.count * _MAGIC_BITS) % _RING)
        return {
            name: torch.from_numpy((ring - offset).view(np.int64)).reshape(self.shapes[name])
            for name, ring in self.ring.items()
        }

    def restore(self, integers: Mapping[str, U64], count: int) -> None:
        """Take over sums in steps, as `integers` gives them, that ``count`` terms were added up to elsewhere.

        Args:
            integers: name to ``(numel,)`` words, the two's complement of the sums.
            count: of terms.

        Raises:
            Refusal: "capacity" for more terms than the grid admits; "schema" for another size.
        """
        if count > self.grid.clients:
            raise Refusal("capacity", f"a sum of {count} terms, the grid admits {self.grid.clients}")
        offset = np.uint64((count * _MAGIC_BITS) % _RING)
        for name, ring in self.ring.items():
            if integers[name].shape != ring.shape:
                raise Refusal("schema", f"leaf {name} has {integers[name].size} sums, expected {ring.size}")
            np.add(integers[name], offset, out=ring)
        self.count = count

    def value(self, name: str, divisor: float = 1.0) -> Tensor:
        """One sum divided by ``divisor``, as ``float64`` of the given shape."""
        return self.write(name, divisor, torch.float64)

    def write(self, name: str, divisor: float, dtype: torch.dtype) -> Tensor:
        """One sum divided by ``divisor``, rounded once to ``dtype``; needs no float64 copy of the whole leaf."""
        out = torch.empty(self.ring[name].size, dtype=dtype)
        for start in range(0, out.numel(), _PIECE):
            part = slice(start, start + _PIECE)
            out[part] = self._exact(name, part) / divisor
        return out.reshape(self.shapes[name])

    def drain(self, name: str, divisor: float, dtype: torch.dtype) -> Tensor:
        """As `write`, and gives the leaf's accumulator back: nothing can be added or read afterwards."""
        out = self.write(name, divisor, dtype)
        self._release(name)
        return out

    def _release(self, name: str) -> None:
        self._pieces[name] = []  # they are views of the accumulator and would keep it
        self.ring[name] = np.zeros(0, np.uint64)
        self.grid = replace(self.grid, clients=0)

    def ratio(self, name: str, below: FixedSum, dtype: torch.dtype) -> Tensor:
        """One sum divided elementwise by the same leaf of another, rounded once to ``dtype``."""
        out = torch.empty(self.ring[name].size, dtype=dtype)
        for start in range(0, out.numel(), _PIECE):
            part = slice(start, start + _PIECE)
            out[part] = self._exact(name, part) / below._exact(name, part)
        return out.reshape(self.shapes[name])

    def _exact(self, name: str, part: slice) -> Tensor:
        offset = np.uint64((self.count * _MAGIC_BITS) % _RING)
        steps = (self.ring[name][part] - offset).view(np.int64).astype(np.float64)
        steps *= self.grid.step
        return torch.from_numpy(steps)


def _pattern(x: Tensor, scaled: float) -> U64:
    """Bit patterns ``bits(C) + round(scaled * x)`` of at most `CHUNK` elements, in this thread's buffer."""
    size = x.numel()
    first = SCRATCH.view("first", size)
    first.copy_(x)
    torch.add(MAGIC, first, alpha=scaled, out=first)
    return SCRATCH.bits(size)


def check_values(x: Tensor, limit: float) -> None:
    """Refuse a vector with an element that is not finite or above ``limit`` in absolute value."""
    # The sum of squares is one fast pass and bounds every element, where squares near the limit are neither lost to
    # zero nor all infinite. It overflows to infinity, never to less.
    square = limit * limit * 0.999
    if (
        x.dtype in (torch.float32, torch.float64)
        and 1e-30 < square < math.inf
        and float(torch.dot(x, x)) <= square
    ):
        return
    if x.numel() == 0:
        return
    low, high = torch.aminmax(x)
    top = max(-float(low), float(high))
    if not math.isfinite(top):
        raise Refusal("nonfinite", "a value is NaN or infinite")
    if top > limit:
        raise Refusal(
            "norm", f"a value of {top:.6g} exceeds {limit:.6g}, the bound of the accumulators at this weight"
        )
