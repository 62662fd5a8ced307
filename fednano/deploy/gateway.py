"""The gateway before a SuperLink: lets SuperNodes through, and nobody else's calls.

A SuperLink serves three things on one port: the fleet's calls, which are signed with node keys, its executors', and the
operator's (start a run, register a node), which it takes from anybody. So it listens on loopback only, and this gateway
is what the network sees. It passes ``POST /v1/fleet/...`` on, within limits of size, time and number, and turns all
else away. Bodies are streamed, so that its memory is bounded by the number of connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from dataclasses import dataclass

import h11

from fednano.errors import ConfigError
from fednano.security.place import ServerPlace

__all__ = ["Gateway", "GatewayLimits"]

log = logging.getLogger(__name__)

_PREFIX = b"/v1/fleet/"
_READ = 1 << 16
# Those that concern one connection (RFC 9110 §7.6.1), and those that the gateway sets itself.
_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"host"}


@dataclass(frozen=True)
class GatewayLimits:
    """Bounds on what callers may take.

    Attributes:
        connections: at one time.
        head_seconds: from a connection's first byte to the end of the request's head.
        idle_seconds: without a byte of the body.
        total_seconds: of a whole exchange.
        body_bytes: of one request. Flower cuts what it sends into objects of 5 MiB.
    """

    connections: int = 256
    head_seconds: float = 10.0
    idle_seconds: float = 30.0
    total_seconds: float = 300.0
    body_bytes: int = 32 << 20


class _TurnedAwayError(Exception):
    """A request that is not passed on."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Gateway:
    """A gateway on the running event loop.

    Args:
        place: the server's folder, for its certificate and authority.
        listen: ``HOST`` to listen at.
        port: its port; 0 takes a free one.
        upstream: port of the SuperLink on 127.0.0.1.
        limits: bounds.
    """

    def __init__(
        self,
        place: ServerPlace,
        listen: str,
        port: int,
        upstream: int,
        limits: GatewayLimits | None = None,
    ) -> None:
        self._listen, self._port, self._upstream = listen, port, upstream
        self._limits = limits or GatewayLimits()
        own = place.credentials  # says what is wrong with the key file, if anything is
        self._inside = ssl.create_default_context(cadata=own.root.decode())
        self._outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._outside.minimum_version = ssl.TLSVersion.TLSv1_2
        self._outside.load_cert_chain(place.root / "server.crt", place.root / "server.key")
        self._places = asyncio.Semaphore(self._limits.connections)
        self._server: asyncio.Server | None = None
        self.passed, self.refused = 0, 0

    async def start(self) -> int:
        """Listen; returns the port.

        Raises:
            ConfigError: the port is taken.
        """
        try:
            self._server = await asyncio.start_server(
                self._connected,
                self._listen,
                self._port,
                ssl=self._outside,
                ssl_handshake_timeout=self._limits.head_seconds,
                limit=_READ,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {self._listen}:{self._port}: {error.strerror or error}. Choose another fleet-port, "
                "or end what uses it."
            ) from error
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Take no more connections, and end those that there are."""
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._places.locked():
            self.refused += 1
            writer.transport.abort()
            return
        async with self._places:
            connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16_384)
            try:
                async with asyncio.timeout(self._limits.total_seconds):
                    await self._exchange(connection, reader, writer)
            except _TurnedAwayError as error:
                self.refused += 1
                log.info("turned away %s: %s", writer.get_extra_info("peername"), error)
                await _say(connection, writer, error.status, str(error))
            except (TimeoutError, OSError, h11.ProtocolError, ssl.SSLError) as error:
                self.refused += 1
                log.info("lost %s: %s", writer.get_extra_info("peername"), error)
            finally:
                writer.close()
                with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
                    async with asyncio.timeout(1):
                        await writer.wait_closed()

    async def _exchange(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            async with asyncio.timeout(self._limits.head_seconds):
                head = await _next(connection, reader)
        except TimeoutError:
            raise _TurnedAwayError(408, "the request's head took too long") from None
        if isinstance(head, h11.ConnectionClosed):
            return
        assert isinstance(head, h11.Request)
        self._check(head)
        try:
            inside = await asyncio.open_connection("127.0.0.1", self._upstream, ssl=self._inside, limit=_READ)
        except OSError:
            raise _TurnedAwayError(503, "the SuperLink is not there now; try again") from None
        try:
            await self._pass_on(head, connection, reader, writer, inside)
        finally:
            inside[1].close()

    def _check(self, head: h11.Request) -> None:
        path = head.target.split(b"?")[0]
        if not path.startswith(_PREFIX) or b".." in path or b"%" in path or b"//" in path:
            raise _TurnedAwayError(404, "there is nothing here for the network but the fleet's calls")
        if head.method != b"POST":
            raise _TurnedAwayError(405, "expected POST")
        lengths = [value for name, value in head.headers if name == b"content-length"]
        if lengths and int(lengths[0]) > self._limits.body_bytes:
            raise _TurnedAwayError(413, f"expected at most {self._limits.body_bytes} bytes")

    async def _pass_on(
        self,
        head: h11.Request,
        outer: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        inside: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """One request inward and its response outward. Both are written anew, so nothing can be hidden between them."""
        inner = h11.Connection(h11.CLIENT)
        kept = [(name, value) for name, value in head.headers if name not in _HOP]
        if not any(name == b"content-length" for name, _ in kept):
            kept.append((b"transfer-encoding", b"chunked"))
        own = [(b"host", b"127.0.0.1"), (b"connection", b"close")]
        request = h11.Request(method="POST", target=head.target, headers=[*own, *kept])
        await _send(inner, inside[1], request)
        received = 0
        while True:
            async with asyncio.timeout(self._limits.idle_seconds):
                event = await _next(outer, reader)
            if isinstance(event, h11.Data):
                received += len(event.data)
                if received > self._limits.body_bytes:
                    raise _TurnedAwayError(413, f"expected at most {self._limits.body_bytes} bytes")
                await _send(inner, inside[1], event)
            else:
                break
        if not isinstance(event, h11.EndOfMessage):
            return
        await _send(inner, inside[1], h11.EndOfMessage())
        while True:
            answer = await _next(inner, inside[0])
            if isinstance(answer, h11.Response):
                headers = [(name, value) for name, value in answer.headers if name not in _HOP]
                fresh = h11.Response(
                    status_code=answer.status_code, headers=[*headers, (b"connection", b"close")]
                )
                await _send(outer, writer, fresh)
            elif isinstance(answer, h11.Data):
                await _send(outer, writer, answer)
            elif isinstance(answer, h11.EndOfMessage):
                await _send(outer, writer, h11.EndOfMessage())
                self.passed += 1
                return
            elif isinstance(answer, h11.ConnectionClosed):
                raise _TurnedAwayError(502, "the SuperLink went away")


async def _next(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event
        connection.receive_data(await reader.read(_READ))


async def _send(connection: h11.Connection, writer: asyncio.StreamWriter, event: h11.Event) -> None:
    data = connection.send(event)
    if data:
        writer.write(data)
        await writer.drain()


async def _say(connection: h11.Connection, writer: asyncio.StreamWriter, status: int, text: str) -> None:
    body = text.encode()
    headers = [("content-length", str(len(body))), ("content-type", "text/plain"), ("connection", "close")]
    with contextlib.suppress(OSError, h11.ProtocolError, ssl.SSLError):
        await _send(connection, writer, h11.Response(status_code=status, headers=headers))
        await _send(connection, writer, h11.Data(data=body))
        await _send(connection, writer, h11.EndOfMessage())
