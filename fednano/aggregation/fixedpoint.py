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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fednano.aggregation.update import Refusal
from fednano.errors import ConfigError

__all__ = ["FixedSum", "Grid"]

CHUNK = 32768  # elements; its float64 scratch stays in a core's second-level cache
_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = int(np.float64(_MAGIC).view(np.uint64))
_MAGIC_TENSOR = torch.tensor(_MAGIC, dtype=torch.float64)
_RING = 1 << 64

U64 = npt.NDArray[np.uint64]


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

    Memory: 8 bytes an element, whatever the number of terms.

    Args:
        grid: the shared exponent.
        shapes: name to shape of each tensor.
    """

    def __init__(self, grid: Grid, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.grid = grid
        self.shapes = dict(shapes)
        self.count = 0
        self._ring: dict[str, U64] = {k: np.zeros(math.prod(s), np.uint64) for k, s in self.shapes.items()}
        size = min(CHUNK, max((r.size for r in self._ring.values()), default=0))
        self._scratch = torch.empty(size, dtype=torch.float64)
        self._other = torch.empty(0, dtype=torch.float64)

    def add(self, values: Mapping[str, Tensor], factor: float) -> None:
        """Add ``factor * values``: all of it or, when refused, nothing of it.

        Args:
            values: name to tensor; names and shapes as at construction, any floating dtype.
            factor: finite.

        Raises:
            Refusal: "capacity" after ``grid.clients`` terms; "nonfinite" or "norm" when a term exceeds the
                grid's bound.
        """
        self._transaction(values, factor, None)

    def remove(self, values: Mapping[str, Tensor], factor: float) -> None:
        """Take off what `add` put in with the same arguments; the bits become what they were."""
        for target, x, y in self._chunks(values, None):
            np.subtract(target, self._quantise(x, y, factor), out=target)
        self.count -= 1

    def add_product(self, values: Mapping[str, Tensor], others: Mapping[str, Tensor], factor: float) -> None:
        """Add ``factor * values * others``, elementwise; see `add`."""
        self._transaction(values, factor, others)

    def _transaction(
        self, values: Mapping[str, Tensor], factor: float, others: Mapping[str, Tensor] | None
    ) -> None:
        if self.count >= self.grid.clients:
            raise Refusal(
                "capacity", f"the accumulators admit {self.grid.clients} updates; raise max_clients"
            )
        if not math.isfinite(factor):
            raise Refusal("weight", f"got a factor of {factor}, expected a finite number")
        done: list[tuple[U64, Tensor, Tensor | None]] = []
        try:
            for target, x, y in self._chunks(values, others):
                np.add(target, self._quantise(x, y, factor), out=target)
                done.append((target, x, y))
        except Refusal:
            # Integers: taking off what was added restores the bits.
            for target, x, y in done:
                np.subtract(target, self._quantise(x, y, factor), out=target)
            raise
        self.count += 1

    def _chunks(
        self, values: Mapping[str, Tensor], others: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[U64, Tensor, Tensor | None]]:
        for name, ring in self._ring.items():
            flat = values[name].detach().reshape(-1)
            second = None if others is None else others[name].detach().reshape(-1)
            if flat.numel() != ring.size or (second is not None and second.numel() != ring.size):
                raise Refusal("schema", f"leaf {name} has {flat.numel()} elements, expected {ring.size}")
            for start in range(0, ring.size, CHUNK):
                stop = min(start + CHUNK, ring.size)
                yield ring[start:stop], flat[start:stop], None if second is None else second[start:stop]

    def _quantise(self, x: Tensor, y: Tensor | None, factor: float) -> U64:
        """Bit patterns ``bits(C) + round(factor * x * y / step)`` of a chunk, in the scratch buffer."""
        scaled = math.ldexp(factor, -self.grid.exponent)
        scratch = self._scratch[: x.numel()]
        scratch.copy_(x)
        if y is not None:
            if self._other.numel() == 0:
                self._other = torch.empty_like(self._scratch)
            other = self._other[: x.numel()]
            other.copy_(y)
            scratch.mul_(other)
        self._check(scratch, factor)
        torch.add(_MAGIC_TENSOR, scratch, alpha=scaled, out=scratch)
        return scratch.numpy().view(np.uint64)

    def _check(self, term: Tensor, factor: float) -> None:
        limit = self.grid.bound / abs(factor) if factor else math.inf
        # One fast pass settles the common case: no element exceeds the root of the sum of squares.
        if float(torch.dot(term, term)) <= limit * limit:
            return
        top = float(term.abs().max())
        if not math.isfinite(top):
            raise Refusal("nonfinite", "a value is NaN or infinite")
        if top > limit:
            raise Refusal(
                "norm", f"a value of {top:.6g} at factor {factor:.6g} exceeds the bound {self.grid.bound:.6g}"
            )

    def integers(self) -> dict[str, Tensor]:
        """The sums in steps, ``int64``, shaped as at construction: the elements that secure aggregation masks."""
        offset = np.uint64((self.count * _MAGIC_BITS) % _RING)
        return {
            name: torch.from_numpy((ring - offset).view(np.int64)).reshape(self.shapes[name])
            for name, ring in self._ring.items()
        }

    def value(self, name: str, divisor: float = 1.0) -> Tensor:
        """One sum divided by ``divisor``, as ``float64`` of the given shape."""
        offset = np.uint64((self.count * _MAGIC_BITS) % _RING)
        out = np.empty(self._ring[name].size, np.float64)
        for start in range(0, out.size, CHUNK):
            part = slice(start, start + CHUNK)
            np.multiply((self._ring[name][part] - offset).view(np.int64), self.grid.step, out=out[part])
        out /= divisor
        return torch.from_numpy(out).reshape(self.shapes[name])

    def write(self, name: str, divisor: float, dtype: torch.dtype) -> Tensor:
        """One sum divided by ``divisor``, rounded once to ``dtype``; needs no float64 copy of the whole leaf."""
        offset = np.uint64((self.count * _MAGIC_BITS) % _RING)
        out = torch.empty(self._ring[name].size, dtype=dtype)
        for start in range(0, out.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            exact = (self._ring[name][part] - offset).view(np.int64).astype(np.float64)
            exact *= self.grid.step
            exact /= divisor
            out[part].copy_(torch.from_numpy(exact))
        return out.reshape(self.shapes[name])
