"""Codecs that send a part of the change: its largest entries, or its strongest columns after a cosine transform."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.fft

from fednano.aggregation.codec import F32, U8, Codec, as_bytes, checked_scales
from fednano.aggregation.update import Refusal
from fednano.errors import ConfigError

__all__ = ["DCT", "TopK"]


def _pack_half(values: F32) -> U8:
    """A float32 scale, then the values relative to it in half precision."""
    scale = np.float32(np.abs(values).max(initial=0.0))
    # A scale that is subnormal cannot be divided by without losing everything.
    relative = values / scale if scale > 1e-37 else np.zeros_like(values)
    return np.concatenate([as_bytes(np.array([scale], np.float32)), as_bytes(relative.astype(np.float16))])


def _unpack_half(payload: U8) -> F32:
    scale = checked_scales(payload[:4].copy().view(np.float32))
    relative: F32 = payload[4:].copy().view(np.float16).astype(np.float32)
    if not np.isfinite(relative).all():
        raise Refusal("codec", "a payload holds NaN or infinity")
    out: F32 = relative * scale
    return out


@dataclass(frozen=True)
class TopK(Codec):
    """The largest entries by absolute value, with their positions.

    Attributes:
        density: share of entries that travel; at least one does.
    """

    feedback: bool = True
    density: float = 0.05

    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"codec 'topk': got density={self.density}, expected above 0 and at most 1")

    def _plan(self, size: int) -> tuple[int, bool]:
        """How many travel, and whether their positions are a bitmap."""
        keep = min(size, max(1, int(self.density * size)))
        return keep, 4 * keep > -(-size // 8)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec.nbytes`."""
        size = math.prod(shape)
        keep, bitmap = self._plan(size)
        return (-(-size // 8) if bitmap else 4 * keep) + 4 + 2 * keep

    def pack(self, values: F32) -> U8:
        """See `Codec.pack`."""
        flat = values.reshape(-1)
        keep, bitmap = self._plan(flat.size)
        where = np.sort(np.argsort(-np.abs(flat), kind="stable")[:keep])
        if bitmap:
            chosen = np.zeros(flat.size, bool)
            chosen[where] = True
            positions = np.packbits(chosen)
        else:
            positions = as_bytes(where.astype(np.uint32))
        return np.concatenate([positions, _pack_half(flat[where])])

    def unpack(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """See `Codec.unpack`."""
        size = math.prod(shape)
        keep, bitmap = self._plan(size)
        cut = -(-size // 8) if bitmap else 4 * keep
        if bitmap:
            where = np.flatnonzero(np.unpackbits(payload[:cut], count=size))
        else:
            where = payload[:cut].copy().view(np.uint32).astype(np.int64)
        if where.size != keep or (keep and int(where.max()) >= size) or np.unique(where).size != keep:
            raise Refusal(
                "codec", f"a payload names impossible positions, expected {keep} different ones below {size}"
            )
        out = np.zeros(size, np.float32)
        out[where] = _unpack_half(payload[cut:])
        return out.reshape(shape)


@dataclass(frozen=True)
class DCT(Codec):
    """The strongest columns after a cosine transform along a leaf's longer side.

    Attributes:
        keep: share of columns that travel; at least one does.
    """

    feedback: bool = True
    keep: float = 0.125

    name: ClassVar[str] = "dct"

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"codec 'dct': got keep={self.keep}, expected above 0 and at most 1")

    def _plan(self, shape: tuple[int, ...]) -> tuple[int, int, bool, int]:
        """Rows, columns, whether the matrix is transposed, and how many columns travel."""
        rows, columns = (
            (1, shape[0]) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
        )
        flip = rows > columns
        rows, columns = (columns, rows) if flip else (rows, columns)
        return rows, columns, flip, min(columns, max(1, int(self.keep * columns)))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec.nbytes`."""
        rows, _, _, count = self._plan(shape)
        return 4 * count + 4 + 2 * count * rows

    def pack(self, values: F32) -> U8:
        """See `Codec.pack`."""
        rows, columns, flip, count = self._plan(values.shape)
        matrix = values.reshape(columns, rows).T if flip else values.reshape(rows, columns)
        spectrum = scipy.fft.dct(matrix.astype(np.float64), axis=1, norm="ortho")
        energy = (spectrum * spectrum).sum(axis=0)
        where = np.sort(np.argsort(-energy, kind="stable")[:count])
        return np.concatenate(
            [as_bytes(where.astype(np.uint32)), _pack_half(spectrum[:, where].astype(np.float32))]
        )

    def unpack(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """See `Codec.unpack`."""
        rows, columns, flip, count = self._plan(shape)
        where = payload[: 4 * count].copy().view(np.uint32).astype(np.int64)
        if int(where.max()) >= columns or np.unique(where).size != count:
            raise Refusal(
                "codec",
                f"a payload names impossible columns, expected {count} different ones below {columns}",
            )
        spectrum = np.zeros((rows, columns), np.float64)
        spectrum[:, where] = _unpack_half(payload[4 * count :]).reshape(rows, count)
        matrix = scipy.fft.idct(spectrum, axis=1, norm="ortho").astype(np.float32)
        out: F32 = np.ascontiguousarray(matrix.T if flip else matrix).reshape(shape)
        return out
