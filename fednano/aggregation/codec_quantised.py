"""Codecs that round every element to a few bits: int8, int4, sign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fednano.aggregation.codec import F32, U8, Codec, as_bytes, checked_scales
from fednano.errors import ConfigError

__all__ = ["Int4", "Int8", "Sign"]


@dataclass(frozen=True)
class _Grouped(Codec):
    """Whole numbers with one float32 scale per group of neighbouring elements.

    Attributes:
        group: elements that share a scale.
    """

    group: int = 128

    def __post_init__(self) -> None:
        if self.group < 8 or self.group % 8:
            raise ConfigError(f"codec {self.name!r}: got group={self.group}, expected a multiple of 8")

    def _groups(self, values: F32) -> F32:
        count = -(-values.size // self.group)
        out = np.zeros(count * self.group, np.float32)
        out[: values.size] = values.reshape(-1)
        return out.reshape(count, self.group)

    def _scales(self, payload: U8, size: int) -> tuple[F32, U8]:
        cut = 4 * -(-size // self.group)
        return checked_scales(payload[:cut].copy().view(np.float32)), payload[cut:]


@dataclass(frozen=True)
class Int8(_Grouped):
    """8 bits, symmetric."""

    name: ClassVar[str] = "int8"
    top: ClassVar[int] = 127

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec.nbytes`."""
        size = math.prod(shape)
        return size + 4 * -(-size // self.group)

    def _round(self, values: F32) -> tuple[F32, npt.NDArray[np.int8]]:
        grouped = self._groups(values)
        scales = (np.abs(grouped).max(axis=1, initial=0.0) / self.top).astype(np.float32)
        # A subnormal scale would lose the bound on the error, a zero one would divide by zero.
        safe = np.where(scales > 1e-37, scales, np.float32(1.0))
        whole = np.clip(np.rint(grouped / safe[:, None]), -self.top, self.top).astype(np.int8)
        return np.where(scales > 1e-37, scales, np.float32(0.0)), whole

    def pack(self, values: F32) -> U8:
        """See `Codec.pack`."""
        scales, whole = self._round(values)
        return np.concatenate([as_bytes(scales), as_bytes(whole.reshape(-1)[: values.size])])

    def unpack(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """See `Codec.unpack`."""
        size = math.prod(shape)
        scales, rest = self._scales(payload, size)
        return (rest.view(np.int8).astype(np.float32) * np.repeat(scales, self.group)[:size]).reshape(shape)


@dataclass(frozen=True)
class Int4(Int8):
    """4 bits, symmetric, two to a byte."""

    feedback: bool = True

    name: ClassVar[str] = "int4"
    top: ClassVar[int] = 7

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec.nbytes`."""
        size = math.prod(shape)
        return -(-size // 2) + 4 * -(-size // self.group)

    def pack(self, values: F32) -> U8:
        """See `Codec.pack`."""
        scales, whole = self._round(values)
        size = values.size + values.size % 2
        nibbles = (whole.reshape(-1)[:size] + 8).astype(np.uint8)
        return np.concatenate([as_bytes(scales), nibbles[0::2] | (nibbles[1::2] << 4)])

    def unpack(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """See `Codec.unpack`."""
        size = math.prod(shape)
        scales, rest = self._scales(payload, size)
        nibbles = np.empty(2 * rest.size, np.int8)
        nibbles[0::2], nibbles[1::2] = (rest & 15).astype(np.int8), (rest >> 4).astype(np.int8)
        whole = (nibbles[:size] - 8).astype(np.float32)
        return (whole * np.repeat(scales, self.group)[:size]).reshape(shape)


@dataclass(frozen=True)
class Sign(_Grouped):
    """One bit an element, and per group the mean absolute value in bfloat16.

    Half of a round's change is carried to the next one. The last round of a run therefore travels as int4 by default,
    which pays what is owed: of ten rounds it costs as much as three.
    """

    feedback: bool = True
    last: str = "int4"
    group: int = 256

    name: ClassVar[str] = "sign"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec.nbytes`."""
        size = math.prod(shape)
        return -(-size // 8) + 2 * -(-size // self.group)

    def pack(self, values: F32) -> U8:
        """See `Codec.pack`."""
        grouped = np.abs(self._groups(values)).astype(np.float64)
        counts = np.minimum(self.group, values.size - self.group * np.arange(grouped.shape[0]))
        scales = (grouped.sum(axis=1) / counts).astype(np.float32)
        upper = (scales.view(np.uint32) >> 16).astype(
            np.uint16
        )  # cut, not rounded: no scale becomes infinite
        return np.concatenate([as_bytes(upper), np.packbits(values.reshape(-1) >= 0.0)])

    def unpack(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """See `Codec.unpack`."""
        size = math.prod(shape)
        cut = 2 * -(-size // self.group)
        upper, rest = payload[:cut].copy().view(np.uint16), payload[cut:]
        scales = checked_scales((upper.astype(np.uint32) << 16).view(np.float32))
        signs = np.unpackbits(rest, count=size).astype(np.float32) * 2.0 - 1.0
        return (signs * np.repeat(scales, self.group)[:size]).reshape(shape)
