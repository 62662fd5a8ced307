"""Counter-based random numbers whose bits do not depend on the device.

A seeded basis is shared by agreeing on a seed, so every client must draw the same bits from it, on a CPU,
on a GPU in torch, or inside a Triton kernel. Sequential generators cannot promise that (torch's CPU and
CUDA streams differ); Philox4x32-10 can: output ``i`` is a pure integer function of a key and a counter
(Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011).

The mapping, in full, so that a kernel can reproduce it:

* **Key.** 64 bits: the first 8 bytes, little endian, of ``sha256("fednano/philox/1|<seed>|<site>|<leaf>")``.
  Triton's ``tl.philox(seed, ...)`` with this 64-bit number as its ``seed`` uses the same two key words
  (low, high).
* **Counter.** Element ``e`` of plane ``k`` is word ``k % 4`` of counter ``(e, k // 4, 0, 0)``, all 32 bit.
  A plain tensor has one plane and is numbered row-major, so element ``e`` is ``tl.randint(key, e)``; a
  stack of K tensors (``planes=True``) has one plane per tensor, so that one Philox call serves four of
  them. Triton must be given 32-bit
  counters: with 64-bit ones ``tl.philox`` becomes Philox4x64.
* **Uniform.** ``m = 2 * (word >> 8) - (2**24 - 1)`` is an odd integer in (-2**24, 2**24), exact in
  float32. The value is ``float32(m) * float32(bound / 2**24)``: one correctly rounded product, symmetric,
  never 0 or +-bound.
* **Normal.** Box-Muller needs log and cos, whose last bits differ between CPU and CUDA. Instead the eight
  16-bit halves of the four words of counter ``(e, 0, 0, 0)`` are added as integers, centred and scaled by
  one rounded product. The sum of eight uniforms has excess kurtosis -0.15 and reaches 4.9 standard
  deviations: normal enough for a basis or an initial value, and exact by construction.
"""

from __future__ import annotations

import hashlib
import math
import struct

import torch

__all__ = ["choice", "key", "normal", "permutation", "philox4x32", "uniform", "words"]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_CHUNK = 1 << 20  # counters per step: bounds the int64 temporaries to a few tens of MiB


def key(seed: int, site: str, leaf: str) -> int:
    """Return the 64-bit Philox key of one leaf of one site.

    Args:
        seed: the run's seed, any integer.
        site: the site's name.
        leaf: the leaf's name.
    """
    digest = hashlib.sha256(f"fednano/philox/1|{seed}|{site}|{leaf}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit words held in int64; the 64-bit product may wrap, its
    bits stay."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], k: int, rounds: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32 block function.

    Args:
        counter: four tensors of counter words, each ``(n,)`` int64 in [0, 2**32).
        k: 64-bit key; its low half is key word 0.
        rounds: number of rounds; 10 is the standard.

    Returns:
        Four tensors ``(n,)`` int64 in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = k & _MASK, (k >> 32) & _MASK
    for _ in range(rounds):
        hi0, lo0 = _multiply(_M0, c0)
        hi1, lo1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _blocks(k: int, plane: int, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The four words of counters ``(start..stop, plane, 0, 0)``, each ``(stop - start,)``."""
    c0 = torch.arange(start, stop, dtype=torch.int64, device=device)
    zero = torch.zeros_like(c0)
    return philox4x32((c0, zero + plane, zero, zero), k)


def words(
    k: int, n: int, *, planes: int = 1, first: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return uniform 32-bit words.

    Args:
        k: 64-bit key.
        n: elements per plane, at most 2**32.
        planes: number of planes.
        first: number of the first plane.
        device: where to compute; the bits do not depend on it.

    Returns:
        ``(planes, n)`` int64 in [0, 2**32).
    """
    where = torch.device(device)
    out = torch.empty(planes, n, dtype=torch.int64, device=where)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        for group in range(first // 4, (first + planes + 3) // 4):
            lanes = _blocks(k, group, start, stop, where)
            for lane, word in enumerate(lanes):
                plane = 4 * group + lane - first
                if 0 <= plane < planes:
                    out[plane, start:stop] = word
    return out


def _float32(value: float) -> float:
    """Round a Python float to float32, so that every device multiplies by the same constant."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def uniform(
    k: int,
    shape: tuple[int, ...],
    bound: float = math.sqrt(3.0),
    *,
    planes: bool = False,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return float32 numbers uniform in (-bound, bound), the same bits everywhere.

    Args:
        k: 64-bit key.
        shape: shape of the result.
        bound: half width; the default sqrt(3) gives unit variance.
        planes: whether the first dimension counts planes, see the module's mapping.
        first: number of the first plane; only with ``planes``.
        device: where to compute.
    """
    count, n = (shape[0], math.prod(shape[1:])) if planes else (1, math.prod(shape))
    centred = 2 * (words(k, n, planes=count, first=first, device=device) >> 8) - (2**24 - 1)
    return (centred.to(torch.float32) * _float32(bound / 2**24)).reshape(shape)


def normal(
    k: int, shape: tuple[int, ...], std: float = 1.0, *, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return float32 numbers that are close to normal with mean 0, the same bits everywhere.

    Args:
        k: 64-bit key.
        shape: shape of the result.
        std: standard deviation.
        device: where to compute.
    """
    n, where = math.prod(shape), torch.device(device)
    total = torch.empty(n, dtype=torch.int64, device=where)
    for start in range(0, n, _CHUNK):
        stop = min(start + _CHUNK, n)
        lanes = _blocks(k, 0, start, stop, where)
        total[start:stop] = sum((word >> 16) + (word & 0xFFFF) for word in lanes)
    spread = math.sqrt(4 * 8 * (2.0**32 - 1) / 12)  # of twice the sum of eight 16-bit numbers
    return ((2 * total - 8 * 0xFFFF).to(torch.float32) * _float32(std / spread)).reshape(shape)


def permutation(k: int, n: int) -> torch.Tensor:
    """Return a random order of ``n`` items, ``(n,)`` int64; equal words keep their order, so the result is
    exact."""
    return torch.sort(words(k, n)[0], stable=True).indices


def choice(k: int, n: int, count: int) -> torch.Tensor:
    """Return ``count`` different numbers of ``range(n)``, ascending, ``(count,)`` int64."""
    return permutation(k, n)[:count].sort().values
