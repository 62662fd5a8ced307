"""Counter-based random numbers whose bits do not depend on the device.

A seeded basis is shared by agreeing on a seed, so every client must draw the same bits from it, on a CPU,
on a GPU in torch, or inside a Triton kernel. Sequential generators cannot promise that (torch's CPU and
CUDA streams differ); Philox4x32-10 can: output ``i`` is a pure integer function of a key and a counter
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The mapping, in full, so that a kernel can reproduce it:

* **Key.** 64 bits: the first 8 bytes, little endian, of ``sha256("fednano/philox/1|<seed>|<site>|<leaf>")``.
  Triton's ``tl.philox(seed, ...)`` with this 64-bit number as its ``seed`` uses the same two key words
  (low, high).
* **Counter.** Element ``e`` of plane ``k`` is word ``k % 4`` of counter ``(e, k // 4, 0, 0)``, all 32 bit.
  A plain tensor has one plane and is numbered row-major, so element ``e`` is ``tl.randint(key, e)``; a
  stack of K tensors (``planes=True``) has one plane per tensor, so that one Philox call serves four of
  them. Triton must be given 32-bit counters: with 64-bit ones ``tl.philox`` becomes Philox4x64.
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

__all__ = ["key", "normal", "permutation", "philox4x32", "sample", "signed", "ternary", "uniform", "words"]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
Key = int | torch.Tensor
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


def signed(k: int) -> int:
    """The key as a signed 64-bit number, to store it in an int64 tensor."""
    return k - 2**64 if k >= 2**63 else k


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit words held in int64; the 64-bit product may wrap, its
    bits stay."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], k: Key, rounds: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32 block function.

    Args:
        counter: four tensors of counter words, each ``(n,)`` int64 in [0, 2**32).
        k: 64-bit key, an int or a 0-d int64 tensor (no device synchronisation); its low half is key word 0.
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


def words(
    k: Key, n: int, *, planes: int = 1, first: int = 0, device: torch.device | str = "cpu"
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
    start, stop = first // 4, (first + planes + 3) // 4  # groups of four planes share their counters
    out = torch.empty(stop - start, 4, n, dtype=torch.int64, device=where)
    width = min(n, _CHUNK)
    height = max(1, _CHUNK // max(1, width))
    for low in range(start, stop, height):
        group = torch.arange(low, min(low + height, stop), dtype=torch.int64, device=where)[:, None]
        for left in range(0, n, width):
            element = torch.arange(left, min(left + width, n), dtype=torch.int64, device=where)[None, :]
            zero = torch.zeros_like(element + group)
            lanes = philox4x32((zero + element, zero + group, zero, zero), k)
            out[low - start : low - start + len(group), :, left : left + width] = torch.stack(lanes, 1)
    return out.view(4 * (stop - start), n)[first - 4 * start : first - 4 * start + planes]


def _float32(value: float) -> float:
    """Round a Python float to float32, so that every device multiplies by the same constant."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def uniform(
    k: Key,
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
        c0 = torch.arange(start, stop, dtype=torch.int64, device=where)
        zero = torch.zeros_like(c0)
        lanes = philox4x32((c0, zero, zero, zero), k)
        total[start:stop] = sum((word >> 16) + (word & 0xFFFF) for word in lanes)
    spread = math.sqrt(4 * 8 * (2.0**32 - 1) / 12)  # of twice the sum of eight 16-bit numbers
    return ((2 * total - 8 * 0xFFFF).to(torch.float32) * _float32(std / spread)).reshape(shape)


def permutation(k: int, n: int) -> torch.Tensor:
    """Return a random order of ``n`` items, ``(n,)`` int64; equal words keep their order, so the result is
    exact."""
    return torch.sort(words(k, n)[0], stable=True).indices


def sample(k: int, n: int, count: int) -> torch.Tensor:
    """Return ``count`` different numbers of ``range(n)`` in random order, ``(count,)`` int64.

    Fewer numbers are the first of more. Up to n / 2 numbers come from words scaled to the range with
    repetitions dropped, so that work grows with ``count`` and not with n; the rest from a `permutation`.
    """
    if n >= 2**31 or count > n:
        raise ValueError(f"sample: got n={n}, count={count}; expected count <= n < 2**31")
    half, tries = min(count, n // 2), 2 * min(count, n // 2) + 64
    first = _distinct(k, n, tries)
    while len(first) < half:
        tries *= 2
        first = _distinct(k, n, tries)
    first = first[:half]
    if count == half:
        return first
    rest = permutation(k, n)
    return torch.cat([first, rest[~torch.isin(rest, first)]])[:count]


def _distinct(k: int, n: int, tries: int) -> torch.Tensor:
    """Numbers of ``range(n)`` in the order of their first draw among ``tries``."""
    drawn = (words(k, tries)[0] * n) >> 32
    order = torch.sort(drawn, stable=True)
    fresh = torch.ones_like(drawn, dtype=torch.bool)
    fresh[1:] = order.values[1:] != order.values[:-1]
    return drawn[order.indices[fresh].sort().values]


def ternary(k: int, shape: tuple[int, ...], *, planes: bool = False) -> torch.Tensor:
    """Return float32 -sqrt(3), 0, sqrt(3) with probabilities 1/6, 2/3, 1/6: unit variance, sparse.

    Args:
        k: 64-bit key.
        shape: shape of the result.
        planes: whether the first dimension counts planes.
    """
    count, n = (shape[0], math.prod(shape[1:])) if planes else (1, math.prod(shape))
    word = words(k, n, planes=count)
    sign = (word < 2**32 // 6).to(torch.int64) - (word >= 2**32 - 2**32 // 6).to(torch.int64)
    return (sign.to(torch.float32) * _float32(math.sqrt(3.0))).reshape(shape)
