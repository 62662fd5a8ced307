"""The files that operator and site send each other, and what both must agree about in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fednano.errors import ConfigError, RequestRefused
from fednano.security.authority import SERVER
from fednano.security.keys import NAME

__all__ = ["load_letter", "named", "openssh_public"]

_MOST_BYTES = 64 << 10


def openssh_public(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as one line of OpenSSH, the form in which Flower takes it."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def named(said: dict[str, Any]) -> str:
    """The site that a file names; a name that could lead out of a folder is none."""
    site = said.get("site")
    if not isinstance(site, str) or not NAME.fullmatch(site) or site == SERVER:
        raise RequestRefused(f"{site!r} is not the name of a site.")
    return site


def load_letter(path: Path, kinds: set[str]) -> dict[str, Any]:
    """A file that came from the other side.

    Raises:
        ConfigError: too large, not JSON, or of another kind.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        said = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    if not isinstance(said, dict) or not isinstance(said.get("kind"), str) or said["kind"] not in kinds:
        raise ConfigError(f"{path} is no {' or '.join(sorted(kinds))} of `fednano deploy`.")
    texts = {"invitation": ("federation", "fleet", "host", "authority", "secret"), "signed": ("certificate",)}
    for name in texts.get(said["kind"], ("csr", "node_key", "proof")):
        if not isinstance(said.get(name), str):
            raise ConfigError(f"{path} lacks {name!r}; it is damaged.")
    return said
