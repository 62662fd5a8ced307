"""Vectors of integers modulo 2**64, and masks for them from ChaCha20.

A mask is the keystream of ChaCha20 (RFC 8439) under a key that is used once, read as little-endian words. It is made
and added piece by piece, so that a mask of a large vector never leaves a core's cache and takes no memory.
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

__all__ = ["U64", "add_mask"]

U64 = npt.NDArray[np.uint64]

_PIECE = 32768  # words; 256 kB of zeros, as much of keystream
_ZEROS = bytes(8 * _PIECE)
_NONCE = bytes(16)  # counter and nonce from zero: each key makes one mask


def add_mask(vector: U64, key: bytes, sign: int) -> None:
    """Add a key's mask to a vector, or take it off, in place.

    Args:
        vector: ``(length,)`` words.
        key: 32 bytes, for this mask alone.
        sign: 1 to add, -1 to take off.
    """
    stream = Cipher(algorithms.ChaCha20(key, _NONCE), None).encryptor()
    buffer = bytearray(8 * min(_PIECE, vector.size))
    mask = np.frombuffer(buffer, np.uint64)
    operation = np.add if sign > 0 else np.subtract
    for start in range(0, vector.size, _PIECE):
        piece = vector[start : start + _PIECE]
        stream.update_into(_ZEROS[: 8 * piece.size], buffer)
        if sys.byteorder == "big":
            mask.byteswap(inplace=True)
        operation(piece, mask[: piece.size], out=piece)
