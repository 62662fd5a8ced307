"""Shamir's secret sharing (CACM 22(11), 1979) of 32-byte secrets over the integers modulo the prime 2**256 + 297.

The prime is the smallest above 2**256, so each string of 32 bytes is one element; a share takes 33 bytes. Any t
shares give the secret, fewer say nothing about it. Shares are bare values: what belongs to whom is known to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fednano.privacy.secagg.errors import BelowThreshold, ProtocolError

__all__ = ["PRIME", "SHARE_BYTES", "combine", "recover", "split"]

PRIME = (1 << 256) + 297
SHARE_BYTES = 33


def split(secret: bytes, coefficients: Sequence[bytes], holders: Sequence[int]) -> list[bytes]:
    """Shares of a secret, one a holder.

    Args:
        secret: 32 bytes.
        coefficients: t - 1 strings of 48 random bytes; t shares will give the secret back. 48 bytes reduced modulo the
            prime are uniform up to 2**-127.
        holders: distinct numbers from 1; share i is the value of the polynomial at ``holders[i]``.

    Returns:
        33 bytes a holder.
    """
    numbers = [int.from_bytes(c, "little") % PRIME for c in reversed(coefficients)]
    constant = int.from_bytes(secret, "little")
    shares = []
    for x in holders:
        value = 0
        for number in numbers:
            value = (value + number) * x % PRIME
        shares.append(((value + constant) % PRIME).to_bytes(SHARE_BYTES, "little"))
    return shares


def combine(shares: Mapping[int, bytes], threshold: int, weights: dict[tuple[int, ...], list[int]]) -> bytes:
    """The secret, from the first ``threshold`` shares by number of the holder.

    Args:
        shares: holder to share.
        threshold: t.
        weights: keeps Lagrange's weights by set of holders, since many secrets have the same.

    Raises:
        BelowThreshold: fewer than t shares.
        ProtocolError: a share is none, or the shares do not belong to one 32-byte secret.
    """
    if len(shares) < threshold:
        raise BelowThreshold(f"{len(shares)} shares of a secret are left, {threshold} are needed.")
    holders = tuple(sorted(shares)[:threshold])
    if holders not in weights:
        weights[holders] = _lagrange(holders)
    total = 0
    for holder, weight in zip(holders, weights[holders], strict=True):
        total += read(shares[holder]) * weight
    total %= PRIME
    if total >> 256:
        raise ProtocolError("the shares do not belong to one secret: together they give none of 32 bytes.")
    return total.to_bytes(32, "little")


def recover(
    shares: Mapping[int, bytes],
    threshold: int,
    right: Callable[[bytes], bool],
    weights: dict[tuple[int, ...], list[int]],
) -> bytes:
    """The secret that passes a check, even if one share too many is wrong.

    Args:
        shares: holder to share.
        threshold: t.
        right: tells the secret from anything else, such as by its public key.
        weights: see `combine`.

    Raises:
        BelowThreshold: fewer than t shares.
        ProtocolError: no secret that passes, with all shares or without any one of them.
    """
    attempts: list[Mapping[int, bytes]] = [shares]
    if len(shares) > threshold:  # the first t were tried with `shares` itself
        first = sorted(shares)[:threshold]
        attempts += [{x: share for x, share in shares.items() if x != out} for out in first]
    for attempt in attempts:
        try:
            secret = combine(attempt, threshold, weights)
        except ProtocolError:
            continue
        if right(secret):
            return secret
    raise ProtocolError(
        f"{len(shares)} shares of a secret are inconsistent: what they give is not what its owner committed to."
    )


def read(share: bytes) -> int:
    """A share as a number. Raises ProtocolError for anything that is no share."""
    if len(share) != SHARE_BYTES:
        raise ProtocolError(f"a share has {len(share)} bytes, expected {SHARE_BYTES}.")
    value = int.from_bytes(share, "little")
    if value >= PRIME:
        raise ProtocolError("a share is not an element of the field.")
    return value


def _lagrange(holders: Sequence[int]) -> list[int]:
    """Weights w with ``f(0) = sum_i w_i f(x_i)``: ``w_i = prod_{j != i} x_j / (x_j - x_i)``."""
    weights = []
    for i, x in enumerate(holders):
        above = below = 1
        for j, other in enumerate(holders):
            if j != i:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return weights
