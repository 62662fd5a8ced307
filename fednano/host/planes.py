"""Chunks of tensors without their redundancy: byte planes, of which those that repeat themselves are Huffman-coded.

The bytes of neighbouring numbers that carry sign and exponent take few values, those of the mantissa take all. So a
chunk is taken apart into four planes (byte 0, 4, 8, ...; byte 1, 5, 9, ...; and so on, whatever the numbers' width),
each is coded by DEFLATE's Huffman codes alone (RFC 1951; looking for repeated strings finds none in such data and
costs ten times as much) where a sample of it says that this pays, and all come back to the bit.

Coded chunk: the number of raw bytes, uint32; then for each plane the number of its coded bytes, uint32, 0 for a plane
that is as it was; then the planes. All numbers are little-endian.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import numpy as np

from fednano.errors import HostRefused

__all__ = ["Bytes", "expand", "squeeze"]

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

_PLANES: Final = 4
_HEADER: Final = struct.Struct(f"<{1 + _PLANES}I")
_MOST: Final = 4 << 20
"""Raw bytes of a coded chunk at most: those of the largest message without coding."""
_SAMPLE: Final = 4096
_WORTH: Final = 7.2
"""Bits of entropy a byte below which a plane is coded; at 8 nothing is gained."""


def squeeze(chunk: memoryview) -> bytes | None:
    """The coded form of a chunk of raw bytes, or ``None`` where it is not at least a sixteenth shorter.

    Args:
        chunk: contiguous bytes, at most 4 MiB.
    """
    raw = np.frombuffer(chunk, dtype=np.uint8)
    planes = [np.ascontiguousarray(raw[first::_PLANES]) for first in range(_PLANES)]
    coded = [_deflate(plane) if _bits(plane) < _WORTH else b"" for plane in planes]
    parts = [own or plane.data for own, plane in zip(coded, planes, strict=True)]
    if _HEADER.size + sum(map(len, parts)) > len(raw) - len(raw) // 16 - 1:
        return None
    return b"".join((_HEADER.pack(len(raw), *map(len, coded)), *parts))


def expand(coded: bytes | memoryview, room: int) -> Bytes:
    """The raw bytes ``(n,)`` of a coded chunk, at most 4 MiB of them, whatever comes.

    Args:
        coded: from `squeeze`, or from anybody.
        room: the most raw bytes that may come out, if fewer.

    Raises:
        HostRefused: not the form that `squeeze` gives, or more bytes than that.
    """
    room = min(room, _MOST)
    if len(coded) < _HEADER.size:
        raise HostRefused(f"coded chunk: got {len(coded)} bytes, expected a header of {_HEADER.size}")
    size, *lengths = _HEADER.unpack_from(coded)
    if not 0 < size <= room:
        raise HostRefused(f"coded chunk: got one of {size} raw bytes, expected 1 to {room}")
    raw, at = np.empty(size, dtype=np.uint8), _HEADER.size
    for first, length in enumerate(lengths):
        count = len(range(first, size, _PLANES))
        piece = memoryview(coded)[at : at + (length or count)]
        plane = _inflate(piece, count) if length else piece
        if len(plane) != count:
            raise HostRefused(f"coded chunk: got {len(plane)} bytes in plane {first}, expected {count}")
        raw[first::_PLANES] = np.frombuffer(plane, dtype=np.uint8)
        at += len(piece)
    if at != len(coded):
        raise HostRefused(f"coded chunk: got {len(coded)} bytes, expected {at} as its header says")
    return raw


def _bits(plane: Bytes) -> float:
    """Entropy in bits a byte of a sample from the whole of a plane; 8 for one too short to tell."""
    if len(plane) < 256:
        return 8.0
    seen = plane[:: max(1, len(plane) // _SAMPLE)]
    shares = np.bincount(seen, minlength=256) / len(seen)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _deflate(plane: Bytes) -> bytes:
    packer = zlib.compressobj(
        level=1, method=zlib.DEFLATED, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY
    )
    return packer.compress(plane.data) + packer.flush()


def _inflate(piece: memoryview, count: int) -> bytes:
    """At most ``count + 1`` bytes: one too many shows that there are more."""
    reader = zlib.decompressobj(wbits=-15)
    try:
        plane = reader.decompress(piece, count + 1)
    except zlib.error as error:
        raise HostRefused(f"coded chunk: not DEFLATE ({error})") from error
    if not reader.eof or reader.unused_data:
        raise HostRefused(f"coded chunk: a plane does not end after {count} bytes")
    return plane
