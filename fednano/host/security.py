"""Who may call the host, and over what.

Two places: the channel (TLS, or plain text on loopback only) and the call (a bearer token in the metadata
entry ``authorization``, checked by a `TokenVerifier`). `StaticTokens` is the verifier of a simulation, where
the server hands random tokens to its clients. `RunTokens` is that of a federation: signed capabilities, each bound to
a run and to the TLS certificate of one site.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import grpc

from fednano.errors import ConfigError, RequestRefused
from fednano.security.authority import SERVER, certificate_facts
from fednano.security.place import ServerPlace
from fednano.security.tokens import Allowance, check_token

__all__ = [
    "Claims",
    "HostSecurity",
    "RunTokens",
    "StaticTokens",
    "TokenRefusedError",
    "TokenVerifier",
    "bearer",
    "is_loopback",
    "new_token",
    "parse_bearer",
]


@dataclass(frozen=True)
class Claims:
    """What a verified token says of its bearer.

    Attributes:
        bearer: whom the call is counted for, and in whose room samples are kept.
        allowance: what that bearer may take; ``None``: as much as the host gives.
    """

    bearer: str = ""
    allowance: Allowance | None = None


_MIN_TOKEN = 16


class TokenRefusedError(Exception):
    """The token does not admit this call; the message is sent to the caller."""


class TokenVerifier(Protocol):
    """Decides whether a token admits a call."""

    def verify(self, token: bytes, *, method: str, peer: str, certificate: bytes | None) -> Claims:
        """Return what the token says of its bearer.

        Called on the event loop of the host, so it must not block.

        Args:
            token: the raw token.
            method: name of the call, such as ``"Step"``.
            peer: address of the caller as gRPC prints it.
            certificate: PEM of the certificate that the caller has shown, which its TLS key has been proved for.

        Raises:
            TokenRefusedError: the token is unknown, expired, or does not cover this call.
        """
        ...


def new_token() -> bytes:
    """A fresh random token of 32 bytes."""
    return secrets.token_bytes(32)


class StaticTokens:
    """Admits a fixed set of tokens to every method.

    Args:
        tokens: raw tokens of at least 16 bytes, or a mapping from the bearer's name to its token.

    Raises:
        ConfigError: no token, or one that is too short to resist guessing.
    """

    def __init__(self, tokens: Iterable[bytes] | Mapping[str, bytes]) -> None:
        named = dict(tokens if isinstance(tokens, Mapping) else {f"run-{i}": t for i, t in enumerate(tokens)})
        if not named:
            raise ConfigError(
                "tokens: got none, expected at least one; leave the verifier out to admit everybody"
            )
        short = [name for name, token in named.items() if len(token) < _MIN_TOKEN]
        if short:
            raise ConfigError(
                f"token {short[0]!r} is shorter than {_MIN_TOKEN} bytes; use secrets.token_bytes(32)"
            )
        self._tokens = named

    def verify(self, token: bytes, *, method: str, peer: str, certificate: bytes | None) -> Claims:
        """See `TokenVerifier.verify`. Takes the same time whichever token matches, or none."""
        bearer_name = ""
        for name, known in self._tokens.items():
            if hmac.compare_digest(known, token):
                bearer_name = name
        if not bearer_name:
            raise TokenRefusedError("unknown token")
        return Claims(bearer_name)


class RunTokens:
    """Admits the run tokens of one federation's server, each from the site that it names, while its run is active.

    Args:
        keys: public keys of those who may issue tokens, hexadecimal.
        federation: its name.
        active: whether tokens of a run are good.
        admits: whether a site is enrolled and a certificate's serial number is one of its own.
    """

    def __init__(
        self,
        keys: Iterable[str],
        federation: str,
        *,
        active: Callable[[str], bool],
        admits: Callable[[str, str], bool],
    ) -> None:
        self._keys, self._federation = tuple(keys), federation
        self._active, self._admits = active, admits

    @classmethod
    def of_place(cls, place: ServerPlace) -> RunTokens:
        """The verifier of a server's own host; what is revoked or ended counts from the next call on."""
        known = _Remembered(place)
        return cls([known.key], place.federation, active=place.is_active, admits=known.admits)

    def verify(self, token: bytes, *, method: str, peer: str, certificate: bytes | None) -> Claims:
        """See `TokenVerifier.verify`."""
        try:
            said = check_token(token, self._keys, self._federation)
        except RequestRefused as error:
            raise TokenRefusedError(str(error)) from None
        if certificate is None:
            raise TokenRefusedError("a run token goes with the certificate of its site; none was shown")
        try:
            name, serial = _shown(certificate)
        except ValueError:
            raise TokenRefusedError("the certificate shown cannot be read") from None
        if name != said.site:
            raise TokenRefusedError(f"the token is for {said.site}, the caller is {name}")
        if not self._admits(name, serial):
            raise TokenRefusedError(f"{name} is not enrolled (any more) with the certificate shown")
        if not self._active(said.run):
            raise TokenRefusedError(f"the token is for run {said.run}, which is not under way")
        return Claims(said.bearer, said.allowance)


@lru_cache(maxsize=1024)
def _shown(certificate: bytes) -> tuple[str, str]:
    return certificate_facts(certificate)[:2]


class _Remembered:
    """What the folder of a server says of its sites, read anew when the file changes."""

    def __init__(self, place: ServerPlace) -> None:
        from fednano.security.keys import load_public

        self.key = load_public(place.root / "tokens.pub")
        self._place, self._seen = place, (0, 0)
        self._good: dict[str, set[str]] = {}

    def admits(self, site: str, serial: str) -> bool:
        """See `ServerPlace.admits`; the server itself shows the certificate that lies in its folder."""
        state = (self._place.root / "sites.json").stat()
        own = (self._place.root / "server.crt").stat()
        seen = (state.st_mtime_ns, own.st_mtime_ns)
        if seen != self._seen:
            good = {
                name: {known.serial, known.previous} - {""}
                for name, known in self._place.sites().items()
                if not known.revoked
            }
            good[SERVER] = {certificate_facts((self._place.root / "server.crt").read_bytes())[1]}
            self._good, self._seen = good, seen
        return serial in self._good.get(site, ())


@dataclass(frozen=True)
class HostSecurity:
    """How a host protects its channel and its calls.

    Attributes:
        certificate: PEM chain of the server, or ``None`` for plain text (loopback only).
        key: PEM private key of the server.
        client_ca: PEM certificates; when given, clients must show a certificate signed by one of them.
        verifier: checks the token of each call; ``None`` admits everybody.
    """

    certificate: bytes | None = None
    key: bytes | None = None
    client_ca: bytes | None = None
    verifier: TokenVerifier | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            got = "a certificate without its key" if self.key is None else "a key without its certificate"
            raise ConfigError(f"TLS: got {got}, expected both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ConfigError(
                "TLS: client certificates need TLS: give the server's certificate and key as well"
            )

    @property
    def tls(self) -> bool:
        """Whether the channel is encrypted."""
        return self.certificate is not None

    def credentials(self, address: str) -> grpc.ServerCredentials | None:
        """Credentials to listen at ``address`` with, ``None`` for plain text.

        Raises:
            ConfigError: ``address`` can be reached from other machines, and there is no TLS.
        """
        if self.certificate is None or self.key is None:
            if not is_loopback(address):
                raise ConfigError(
                    f"refusing to listen at {address} without TLS: activations, labels and tokens would cross "
                    "the network in plain text. "
                    "Give a certificate and a key (--tls-cert, --tls-key), or listen on 127.0.0.1"
                )
            return None
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.client_ca, require_client_auth=self.client_ca is not None
        )


def is_loopback(address: str) -> bool:
    """Whether ``HOST:PORT`` (or ``unix:PATH``) can be reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bearer(token: bytes) -> tuple[str, str]:
    """The metadata entry that carries ``token``: ``authorization: Bearer <base64url>`` (RFC 6750, RFC 4648 §5)."""
    return "authorization", "Bearer " + base64.urlsafe_b64encode(token).decode("ascii")


def parse_bearer(value: str | None) -> bytes:
    """The raw token of an ``authorization`` entry.

    Raises:
        TokenRefusedError: there is none, or it is malformed.
    """
    if value is None:
        raise TokenRefusedError("no token: this host wants one in the metadata entry 'authorization'")
    scheme, _, text = value.partition(" ")
    try:
        if scheme.lower() != "bearer" or not text:
            raise ValueError
        return base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise TokenRefusedError("malformed token: expected 'Bearer <base64url>'") from None
