"""The secrets of one client in one session, all derived from one master, and what two clients agree on.

X25519 (RFC 7748) for agreement, HKDF-SHA256 (RFC 5869) for derivation, ChaCha20-Poly1305 (RFC 8439) between clients.
Every derivation names the session and its purpose, so no key serves two ends or two sessions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fednano.privacy.secagg.errors import ProtocolError

__all__ = [
    "PUBLIC_BYTES",
    "Public",
    "Secrets",
    "agree",
    "commitment",
    "derive",
    "opened",
    "public_of",
    "sealed",
]

PUBLIC_BYTES = 96
_NONCE = bytes(12)  # each key seals one message


@dataclass(frozen=True)
class Public:
    """What a client tells of itself.

    Attributes:
        channel: public key for secrecy between clients, 32 bytes.
        mask: public key for masks, 32 bytes.
        commitment: to the seed of its own mask, 32 bytes.
    """

    channel: bytes
    mask: bytes
    commitment: bytes

    def to_bytes(self) -> bytes:
        """96 bytes."""
        return self.channel + self.mask + self.commitment

    @classmethod
    def from_bytes(cls, blob: bytes) -> Public:
        """Inverse of `to_bytes`. Raises ProtocolError for anything else."""
        if len(blob) != PUBLIC_BYTES:
            raise ProtocolError(f"public keys take {PUBLIC_BYTES} bytes, got {len(blob)}.")
        return cls(blob[:32], blob[32:64], blob[64:])


@dataclass(frozen=True)
class Secrets:
    """A client's secrets in a session.

    Attributes:
        channel: private key for secrecy between clients.
        mask: private key for masks, whose bytes are shared among the neighbours.
        seed: of its own mask, which is shared, too.
        polynomials: 32 bytes from which the coefficients of both sharings come.
    """

    channel: X25519PrivateKey
    mask: X25519PrivateKey
    seed: bytes
    polynomials: bytes

    @classmethod
    def of(cls, master: bytes, session: bytes) -> Secrets:
        """Derived from a client's 32 random bytes of this session."""
        channel, mask, seed, shares = (
            derive(master, session, name) for name in (b"channel", b"mask", b"seed", b"shares")
        )
        load = X25519PrivateKey.from_private_bytes
        return cls(load(channel), load(mask), seed, shares)

    def public(self, session: bytes) -> Public:
        """What goes with them."""
        return Public(public_of(self.channel), public_of(self.mask), commitment(self.seed, session))

    def coefficients(self, session: bytes, count: int) -> tuple[list[bytes], list[bytes]]:
        """``count`` coefficients of 48 bytes for the sharing of the key for masks, and for that of the seed."""
        size = 48 * count
        stream = Cipher(
            algorithms.ChaCha20(derive(self.polynomials, session, b"coefficients"), bytes(16)), None
        )
        block = stream.encryptor().update(bytes(2 * size))
        cut = [block[start : start + 48] for start in range(0, 2 * size, 48)]
        return cut[:count], cut[count:]


def derive(secret: bytes, session: bytes, purpose: bytes, length: int = 32) -> bytes:
    """Bytes for one purpose in one session."""
    return HKDF(hashes.SHA256(), length, salt=session, info=b"fednano secagg " + purpose).derive(secret)


def public_of(private: X25519PrivateKey) -> bytes:
    """The public key of a private one."""
    return private.public_key().public_bytes_raw()


def commitment(seed: bytes, session: bytes) -> bytes:
    """Tells whether a recovered seed is the one its owner had."""
    return hashlib.sha256(b"fednano secagg commitment" + session + seed).digest()


def agree(private: X25519PrivateKey, public: bytes, session: bytes, purpose: bytes) -> bytes:
    """32 bytes that only the two owners of the keys know.

    Raises:
        ProtocolError: the other's key is degenerate.
    """
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError("a public key is degenerate: no secret can be agreed with its owner.") from error
    return derive(shared, session, purpose)


def _direction(sender: int, receiver: int) -> bytes:
    return b"%d to %d" % (sender, receiver)


def sealed(
    plain: bytes, private: X25519PrivateKey, public: bytes, session: bytes, sender: int, receiver: int
) -> bytes:
    """A message from one client to another, as it goes through the server: 16 bytes longer."""
    way = _direction(sender, receiver)
    return ChaCha20Poly1305(agree(private, public, session, way)).encrypt(_NONCE, plain, way)


def opened(
    cipher: bytes, private: X25519PrivateKey, public: bytes, session: bytes, sender: int, receiver: int
) -> bytes:
    """Inverse of `sealed`.

    Raises:
        ProtocolError: it was not made by the owner of ``public`` for this receiver in this session.
    """
    way = _direction(sender, receiver)
    try:
        return ChaCha20Poly1305(agree(private, public, session, way)).decrypt(_NONCE, cipher, way)
    except InvalidTag as error:
        raise ProtocolError(
            f"the shares from client {sender} to client {receiver} were changed on the way."
        ) from error
