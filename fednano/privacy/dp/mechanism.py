"""Clipping to a norm, and Gaussian noise that nobody can repeat.

The Gaussian mechanism: of a sum of vectors, each of Euclidean norm at most C, a release with noise of standard
deviation ``z C`` in each element costs what `Ledger.after` counts for noise z.

Noise is no part of "same seed, same bits": who could repeat it could take it off. It comes from ChaCha20 under a key
from the operating system, by the inverse of the normal distribution function. It is a double, added to sums on a grid
2**-40 times finer than itself; the finite precision of doubles (Mironov, CCS 2012) is not accounted for.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

__all__ = ["Noise", "clip_factor", "norm"]


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all elements together, in float64."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in tensors))


def clip_factor(length: float, bound: float) -> float:
    """What a vector of norm ``length`` is multiplied by to have norm ``bound`` at most; 0 if it is not finite."""
    if not math.isfinite(length):
        return 0.0
    return min(1.0, bound / length) if length > 0 else 1.0


class Noise:
    """A stream of standard normal numbers, and of coins.

    Args:
        key: 32 bytes; from the operating system unless a test gives them.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._stream = Cipher(
            algorithms.ChaCha20(key or secrets.token_bytes(32), bytes(16)), None
        ).encryptor()

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, float64."""
        from scipy.special import ndtri

        return torch.from_numpy(ndtri(self._uniform(math.prod(shape)))).reshape(shape)

    def coins(self, count: int, probability: float) -> list[int]:
        """Numbers below ``count``, each drawn with ``probability``, independently."""
        return [int(i) for i in np.flatnonzero(self._uniform(count) < probability)]

    def _uniform(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """In (0, 1): odd multiples of 2**-53, all of them doubles."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), np.dtype("<u8")) >> np.uint64(12)
        return (words.astype(np.float64) + 0.5) * 2.0**-52
