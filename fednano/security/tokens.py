"""Run tokens: signed capabilities that admit one site to the language host, for one run, for a while, within limits.

A token is a 64-byte Ed25519 signature (RFC 8032) followed by the canonical JSON (RFC 8785) that it covers. It is worth
nothing without the TLS key of the site that it names (compare RFC 8705): the host takes the caller's name from its
certificate, so a token that was copied, or is shown by another site, admits nobody.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fednano.errors import ConfigError, RequestRefused
from fednano.security.canonical import canonical, parse_canonical
from fednano.security.keys import NAME, Signer, valid_signature

__all__ = ["Allowance", "RunToken", "check_token", "sign_token"]

_PURPOSE = "run token"
_SIGNATURE_BYTES = 64
_MOST_BYTES = 2048
_LEEWAY_S = 60.0  # clocks differ


@dataclass(frozen=True)
class Allowance:
    """What a token lets its bearer take of the host. A site's tokens of one run share one allowance.

    Attributes:
        calls_per_minute: calls begun.
        open_calls: calls at one time, those included that have not sent their header yet.
        request_bytes: tensor bytes of one call.
        buffered_bytes: tensor bytes of all its calls at one time.
    """

    calls_per_minute: int = 6_000
    open_calls: int = 32
    request_bytes: int = 256 << 20
    buffered_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{spec.name} is {value!r}; expected a whole number of at least 1.")


@dataclass(frozen=True)
class RunToken:
    """What a token says.

    Attributes:
        federation: name of the federation whose host it is for.
        run: id of the run.
        site: who may use it.
        expires: seconds since 1970.
        issued: seconds since 1970.
        allowance: limits.
        id: random, for revocation and the audit log.
    """

    federation: str
    run: str
    site: str
    expires: int
    issued: int = field(default_factory=lambda: int(time.time()))
    allowance: Allowance = field(default_factory=Allowance)
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def bearer(self) -> str:
        """Whom the host counts its calls for."""
        return f"{self.run}/{self.site}"


def sign_token(token: RunToken, signer: Signer) -> bytes:
    """The token as bytes."""
    body = canonical(asdict(token))
    return bytes.fromhex(signer.sign(_PURPOSE, body)) + body


def check_token(
    raw: bytes,
    keys: Sequence[str],
    federation: str,
    *,
    now: Callable[[], float] = time.time,
) -> RunToken:
    """What a token says, if it is genuine and in force.

    Args:
        raw: as :func:`sign_token` makes it.
        keys: public keys of those who may issue tokens, hexadecimal.
        federation: whose host this is.
        now: the clock.

    Raises:
        RequestRefused: with the reason; nothing of the token is believed before its signature holds.
    """
    if not _SIGNATURE_BYTES < len(raw) <= _MOST_BYTES:
        raise RequestRefused(f"the token has {len(raw)} bytes, which no run token has")
    signature, body = raw[:_SIGNATURE_BYTES].hex(), raw[_SIGNATURE_BYTES:]
    if not any(valid_signature(key, _PURPOSE, body, signature) for key in keys):
        raise RequestRefused("unknown token: it is not signed by this federation's server")
    try:
        token = _parse(parse_canonical(body))
    except (ValueError, TypeError, ConfigError) as error:
        raise RequestRefused(f"the token cannot be read: {error}") from error
    if token.federation != federation:
        raise RequestRefused(f"the token is for federation {token.federation!r}, this is {federation!r}")
    moment = now()
    if moment > token.expires:
        raise RequestRefused(f"the token expired {moment - token.expires:.0f} s ago")
    if token.issued > moment + _LEEWAY_S:
        ahead = token.issued - moment
        raise RequestRefused(f"the token was issued {ahead:.0f} s in the future: set the clocks right")
    return token


def _parse(body: Any) -> RunToken:
    if not isinstance(body, dict) or set(body) != {spec.name for spec in fields(RunToken)}:
        raise ValueError("it does not have the fields of a run token")
    texts = [body[name] for name in ("federation", "run", "site", "id")]
    if not all(isinstance(text, str) and NAME.fullmatch(text) for text in texts):
        raise ValueError("a name in it is not one")
    if type(body["expires"]) is not int or type(body["issued"]) is not int:
        raise ValueError("a time in it is not one")
    return RunToken(**{**body, "allowance": Allowance(**body["allowance"])})
