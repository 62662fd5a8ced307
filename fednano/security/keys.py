"""Ed25519 keys (RFC 8032) of sites, approvers and the server, as PEM files.

A private key file may be read by its owner only and is refused otherwise. A site's salt is derived from its private key
(HKDF, RFC 5869), so that a site has one secret to keep; the server is told the salt, other sites never are.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fednano.errors import ConfigError
from fednano.runs.atomic import disk_advice, replace_file

__all__ = [
    "NAME",
    "Signer",
    "create_key",
    "load_public",
    "load_signer",
    "read_private",
    "salted_hash",
    "valid_signature",
    "write_private",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a site, an approver or a key may be called."""

_HEX_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Signer:
    """Somebody who can sign.

    Attributes:
        name: of the site, approver or server.
        private: the key.
    """

    name: str
    private: Ed25519PrivateKey

    @property
    def public(self) -> str:
        """The raw public key in hexadecimal, 64 characters."""
        raw = self.private.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        return raw.hex()

    @property
    def salt(self) -> str:
        """What this site's ids are hashed with: 32 bytes in hexadecimal."""
        raw = self.private.private_bytes_raw()
        derived = HKDF(hashes.SHA256(), length=32, salt=None, info=b"fednano unlearning salt 1").derive(raw)
        return derived.hex()

    def sign(self, purpose: str, content: bytes) -> str:
        """Sign ``content`` for one purpose, in hexadecimal; the signature is worth nothing for another purpose."""
        return self.private.sign(_framed(purpose, content)).hex()


def valid_signature(public: str, purpose: str, content: bytes, signature: str) -> bool:
    """Whether ``signature`` was made by the holder of ``public`` over this purpose and content. Never raises."""
    try:
        if not (_HEX_KEY.fullmatch(public) and re.fullmatch(r"[0-9a-f]{128}", signature)):
            return False
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _framed(purpose, content))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def salted_hash(salt: str, kind: str, text: str) -> str:
    """HMAC-SHA-256 (RFC 2104) of a sample id or a name under a site's salt, in hexadecimal."""
    return hmac.new(bytes.fromhex(salt), f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()


def create_key(folder: Path, name: str) -> Signer:
    """Make a key pair: ``NAME.key`` (PKCS #8 PEM, mode 0600) and ``NAME.pub`` (PEM). Nothing is written over.

    Raises:
        ConfigError: the name cannot be used, the key exists, or the folder cannot be written.
    """
    check_name(name)
    path = folder / f"{name}.key"
    signer = Signer(name, Ed25519PrivateKey.generate())
    pem = signer.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = signer.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".pub").write_bytes(public)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists; a key is never written over. Choose another name or folder, or move the old key away."
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {disk_advice(folder, len(pem), error)}") from error
    return signer


def load_signer(path: Path) -> Signer:
    """Read a private key; its file's name without the ending is the signer's name.

    Raises:
        ConfigError: the file is missing, can be read by others, or holds no Ed25519 key.
    """
    try:
        key = serialization.load_pem_private_key(read_private(path, "fednano unlearn keygen"), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no private key in PEM form ({error}).") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} holds a {type(key).__name__}; expected an Ed25519 key.")
    return Signer(path.stem, key)


def read_private(path: Path, source: str) -> bytes:
    """The content of a private key file.

    Args:
        path: the file.
        source: the command that makes such a file, for the message about a missing one.

    Raises:
        ConfigError: the file is missing, or others than its owner may read or write it.
    """
    try:
        mode = path.stat().st_mode
        if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"the private key {path} can be read or written by others (mode {stat.S_IMODE(mode):04o}); expected "
                f"0600. Run: chmod 600 {path} - and make a new key if others may have read it."
            )
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the private key {path}: {error.strerror}. Make one with: {source}"
        ) from error


def load_public(text_or_path: str | Path) -> str:
    """A public key from a PEM file or from 64 hexadecimal characters; returned in the latter form.

    Raises:
        ConfigError: neither.
    """
    text = str(text_or_path)
    if _HEX_KEY.fullmatch(text):
        return text
    try:
        key = serialization.load_pem_public_key(Path(text).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{text!r} is no public key: expected a PEM file such as server.pub, or 64 hexadecimal characters "
            f"({error})."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{text} holds a {type(key).__name__}; expected an Ed25519 key.")
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def check_name(name: str) -> None:
    """Raise ConfigError unless ``name`` can name a key file on every system."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be a name; use letters, digits, '.', '_' and '-', at most 64, starting with a letter "
            "or digit."
        )


def write_private(path: Path, content: bytes) -> None:
    """Write a file in one step that only its owner may read.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    try:
        replace_file(path, content, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {disk_advice(path.parent, len(content), error)}") from error


def _framed(purpose: str, content: bytes) -> bytes:
    return f"fednano {purpose} 1\n".encode() + content
