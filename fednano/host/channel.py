"""A client's connection: made when first needed, once per process, with retries and one meaning per status.

Every call of the host is free of side effects, so it is repeated for as long as the host is busy or away.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from fednano.errors import ConfigError, HostError, HostRefused, HostUnavailable
from fednano.host.exchange import Exchange
from fednano.host.names import MISSING_KEY, REASON_KEY
from fednano.host.security import bearer, is_loopback
from fednano.host.wire import Meter

__all__ = ["ClientTLS", "HostChannel", "Retry", "SamplesMissing"]

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_Code = grpc.StatusCode
_CERTIFICATE_WORDS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "Hostname Verification")


class SamplesMissing(HostRefused):
    """The host does not keep some samples of a factored step (any more).

    Attributes:
        indexes: which of the step's samples.
    """

    def __init__(self, text: str, indexes: list[int]) -> None:
        super().__init__(text)
        self.indexes = indexes


@dataclass(frozen=True)
class Retry:
    """How long a call may take and be repeated.

    Attributes:
        timeout_s: deadline of one attempt.
        retry_s: how long to repeat a call, from its first failure on.
    """

    timeout_s: float
    retry_s: float

    def __post_init__(self) -> None:
        if not self.timeout_s > 0 or not self.retry_s >= 0:
            raise ConfigError(
                f"timeout_s, retry_seconds: got {self.timeout_s}, {self.retry_s}; expected above 0, and at least 0"
            )


@dataclass(frozen=True)
class ClientTLS:
    """What a client trusts and shows. All PEM.

    Attributes:
        root_certificates: certificates that signed the host's; ``None`` trusts those of the system.
        key: the client's private key, if the host asks for a certificate.
        certificate: the client's certificate chain.
    """

    root_certificates: bytes | None = None
    key: bytes | None = None
    certificate: bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """The same as gRPC credentials."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.key, self.certificate)


class HostChannel:
    """Calls to one host, or to one of several that serve the same model. Safe to use from several threads; each process
    opens its own connections.

    It begins with any of them, stays with it, and goes on to the next when that one is away. No call is ever split
    between two, and a host that keeps samples is asked for its own only.

    Args:
        address: ``HOST:PORT``, or several with commas between them.
        token: sent with each call.
        tls: ``None`` for plain text (loopback only).
        retry: deadlines.
        meter: where to count bytes.

    Raises:
        ConfigError: not an address, or plain text to one that is not loopback.
    """

    def __init__(
        self, address: str, *, token: bytes | None, tls: ClientTLS | None, retry: Retry, meter: Meter
    ) -> None:
        self._addresses = [part.strip() for part in address.split(",")]
        for part in self._addresses:
            if not part:
                raise ConfigError(
                    f"host address: got {address!r}, expected HOST:PORT, or several with commas between them"
                )
            if tls is None and not is_loopback(part):
                raise ConfigError(
                    f"refusing to talk to {part} without TLS: embeddings, labels and the token would cross the "
                    "network in plain text. Leave `insecure` off, and pass root_certificates if the host's are not "
                    "public"
                )
        self._tls, self._retry, self._meter = tls, retry, meter
        self._metadata: tuple[tuple[str, str | bytes], ...] = (bearer(token),) if token is not None else ()
        self._channels: dict[str, grpc.Channel] = {}
        self._pid, self._lock, self._closed = os.getpid(), threading.Lock(), False
        # Its own generator: jitter must not consume the seeded one of an experiment.
        self._random = random.Random()
        # Anywhere in the list, so that the clients of a run share its hosts.
        self._at = self._random.randrange(len(self._addresses))

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the host that is asked now."""
        return self._addresses[self._at]

    def use_token(self, token: bytes) -> None:
        """Send another token from the next call on."""
        self._metadata = (bearer(token),)

    def close(self) -> None:
        """End the connection. Calls after that fail."""
        with self._lock:
            self._closed = True
            # After a fork, the parent's channel must not be touched, not even to close it.
            if self._pid == os.getpid():
                for channel in self._channels.values():
                    channel.close()
            self._channels = {}

    def call(self, name: str, attempt: Callable[[Exchange], T], samples: int = 0) -> T:
        """Make one call, again and again while the host is busy or away.

        Args:
            name: "Step", "Generate", "Describe" or "Stats".
            attempt: does the exchange; may run several times.
            samples: counted when the call succeeds.

        Raises:
            HostUnavailable: nobody answered, or the host stayed busy, for as long as allowed.
            HostRefused: the host will not accept this call.
            HostError: the host failed at it.
        """
        began, tries = 0.0, 0
        while True:
            asked = self.address
            exchange = Exchange(self._open(asked), name, self._metadata, self._retry.timeout_s)
            tries += 1
            done = 0
            try:
                result = attempt(exchange)
                done = samples
                return result
            except grpc.RpcError as error:
                now = time.monotonic()
                began = began or now
                left = self._retry.retry_s - (now - began)
                self._leave(asked, error)
                final = self._final(error, asked) or (
                    self._gave_up(error, tries, now - began)
                    if left <= 0 and tries >= len(self._addresses)
                    else None
                )
                if final is not None:
                    raise final from error
            finally:
                exchange.end()
                self._meter.add(name.lower(), exchange.count(done))
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(tries - 1, 10))
            time.sleep(max(0.0, min(pause * self._random.uniform(0.5, 1.0), left)))

    def _leave(self, asked: str, error: Any) -> None:
        """Go on to the next host if the one that was asked is away, unless another thread did."""
        with self._lock:
            if error.code() == _Code.UNAVAILABLE and asked == self.address:
                self._at = (self._at + 1) % len(self._addresses)

    def _open(self, address: str) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise HostUnavailable(f"the connection to the language host at {address} has been closed")
            if self._pid != os.getpid():
                self._channels, self._pid = {}, os.getpid()
            if address not in self._channels:
                self._channels[address] = self._connect(address)
            return self._channels[address]

    def _connect(self, address: str) -> grpc.Channel:
        options = [
            ("grpc.enable_retries", 0),  # retries are made here, where they are counted
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # A computation may keep the line quiet for long; pings tell a slow host from one that is gone.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # Two clients of one process must not share a connection that one of them may close.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if is_loopback(address):
            options.append(("grpc.enable_http_proxy", 0))
        if self._tls is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, self._tls.credentials(), options)

    def _final(self, error: Any, address: str) -> HostError | None:
        """The exception for a status that no repetition will change, ``None`` for the others."""
        code, text = error.code(), error.details() or ""
        metadata = dict(error.trailing_metadata() or ())
        ours = REASON_KEY in metadata
        at = f"the language host at {address}"
        failure: HostError | None = None
        match code:
            case _Code.FAILED_PRECONDITION if MISSING_KEY in metadata:
                failure = SamplesMissing(text, [int(i) for i in str(metadata[MISSING_KEY]).split(",")])
            case _Code.INVALID_ARGUMENT | _Code.FAILED_PRECONDITION if ours:
                failure = HostRefused(text)
            case _Code.UNAUTHENTICATED | _Code.PERMISSION_DENIED:
                failure = HostRefused(
                    f"{at} refused the token ({text}). Pass the token of this run; "
                    "one from an earlier run, or of a host that was started anew, is no longer valid"
                )
            case _Code.DEADLINE_EXCEEDED:
                failure = HostUnavailable(
                    f"{at} did not answer within {self._retry.timeout_s:g} s. "
                    "Send smaller batches, raise timeout_s, or give the host more workers"
                )
            case _Code.UNIMPLEMENTED:
                failure = HostRefused(
                    f"{at} does not know this call ({text}): is it fednano's, of the same version?"
                )
            case _Code.INTERNAL if ours:
                failure = HostError(f"{at} failed at this call: {text}")
            case _Code.RESOURCE_EXHAUSTED if not ours:
                failure = HostRefused(f"a message was too large for the connection to {address}: {text}")
            case _Code.UNAVAILABLE if any(word in text for word in _CERTIFICATE_WORDS):
                failure = HostRefused(
                    f"no TLS connection to {address}: {text}. Check that the host uses TLS, that "
                    "root_certificates signed its certificate, and that the certificate names this address"
                )
        return failure

    def _gave_up(self, error: Any, tries: int, seconds: float) -> HostUnavailable:
        text = error.details() or error.code().name
        story = f"tried {tries} times over {seconds:.1f} s, last answer: {text}"
        if error.code() == _Code.RESOURCE_EXHAUSTED:
            return HostUnavailable(
                f"the language host at {', '.join(self._addresses)} stayed busy: {story}. "
                "Lower the number of clients at a time, or give the host more workers or a longer queue"
            )
        hint = "" if self._tls else "; if it uses TLS, pass root_certificates instead of insecure=True"
        return HostUnavailable(
            f"no language host answers at {', '.join(self._addresses)}: {story}. Check that it runs (fednano host), "
            f"that the address is right, and that no firewall is between{hint}"
        )
