"""The gateway before the SuperLink: only the fleet's calls pass, whole and unchanged, and nobody holds it up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
from federation_maker import Made, make_federation
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.deploy.gateway import Gateway, GatewayLimits

HEAD = b"POST /v1/fleet/x HTTP/1.1\r\ncontent-length: 9\r\nhost: x\r\n\r\n"
LIMITS = GatewayLimits(connections=8, head_seconds=0.5, idle_seconds=0.5, body_bytes=200_000)


class World:
    """A gateway before an inner server that answers every request with what it received."""

    def __init__(self, made: Made) -> None:
        self.made, self.seen = made, []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.port = self.do(self._start())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    async def _start(self) -> int:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        root = self.made.place.root
        context.load_cert_chain(root / "server.crt", root / "server.key")
        self.inner = await asyncio.start_server(self._echo, "127.0.0.1", 0, ssl=context)
        inside = self.inner.sockets[0].getsockname()[1]
        self.gateway = Gateway(self.made.place, "127.0.0.1", 0, inside, LIMITS)
        return await self.gateway.start()

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, body, target = h11.Connection(h11.SERVER), b"", ""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(1 << 16)
                connection.receive_data(data)
            elif isinstance(event, h11.Request):
                target = event.target.decode()
                self.seen.append((target, dict(event.headers)))
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                break
        if isinstance(event, h11.EndOfMessage):
            answer = target.encode() + b"|" + body
            headers = [("content-length", str(len(answer)))]
            writer.write(connection.send(h11.Response(status_code=200, headers=headers)) or b"")
            writer.write(connection.send(h11.Data(data=answer)) or b"")
        writer.close()

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}",
            verify=ssl.create_default_context(cafile=str(self.made.place.root / "ca.crt")),
            trust_env=False,
            timeout=10,
        )

    def raw(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.made.place.root / "ca.crt"))
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")

    def good(self) -> None:
        with self.client() as client:
            reply = client.post("/v1/fleet/pull-messages", content=b"hello", headers={"x-signature": "s"})
        assert (reply.status_code, reply.content) == (200, b"/v1/fleet/pull-messages|hello")

    def close(self) -> None:
        self.do(self.gateway.stop())
        self.inner.close()

        async def rest() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.do(rest())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(make_federation(tmp_path_factory.mktemp("federation"), "site-a"))
    yield made
    made.close()


def test_the_fleets_calls_pass_with_their_headers(world: World) -> None:
    world.good()
    target, headers = world.seen[-1]
    assert target == "/v1/fleet/pull-messages"
    assert headers[b"x-signature"] == b"s"


@given(body=st.binary(max_size=150_000), pieces=st.booleans())
@settings(max_examples=15, deadline=None)
def test_bodies_arrive_unchanged(world: World, body: bytes, pieces: bool) -> None:
    content = iter([body[i : i + 7_000] for i in range(0, len(body), 7_000)]) if pieces else body
    with world.client() as client:
        assert client.post("/v1/fleet/x", content=content).content == b"/v1/fleet/x|" + body


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet//control",
        "/V1/FLEET/x",
    ],
)
def test_nothing_else_passes(world: World, path: str) -> None:
    before = len(world.seen)
    with world.raw() as line:
        line.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
        assert b" 404 " in line.recv(1000).splitlines()[0]
    assert len(world.seen) == before
    world.good()


@pytest.mark.parametrize("method", ["GET", "PUT", "CONNECT", "OPTIONS"])
def test_other_methods_do_not_pass(world: World, method: str) -> None:
    before = len(world.seen)
    with world.raw() as line:
        line.sendall(f"{method} /v1/fleet/x HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        assert b" 405 " in line.recv(1000).splitlines()[0]
    assert len(world.seen) == before


def test_smuggled_requests_are_no_requests(world: World) -> None:
    """Two lengths, or a length and chunks: what the two sides might read differently is not passed on as it is."""
    hidden = b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    for headers in (
        b"content-length: 5\r\ncontent-length: 90\r\n",
        b"content-length: 90\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
    ):
        before = len(world.seen)
        with world.raw() as line:
            line.sendall(b"POST /v1/fleet/x HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n0\r\n\r\n" + hidden)
            while line.recv(4096):
                pass
        assert not any("control" in target for target, _ in world.seen[before:])
    world.good()


def test_too_large_a_body_is_refused_announced_or_not(world: World) -> None:
    with world.client() as client:
        assert client.post("/v1/fleet/x", content=b"x" * 200_001).status_code == 413
    with world.raw() as line:
        line.sendall(b"POST /v1/fleet/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        piece = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        with pytest.raises(OSError):  # noqa: PT011 - closed, reset or a broken pipe, as it falls
            _drown(line, piece)
    world.good()


def _drown(line: ssl.SSLSocket, piece: bytes) -> None:
    for _ in range(1000):
        line.sendall(piece)
    raise AssertionError("ten megabytes were taken")


def test_slow_callers_are_let_go_and_others_served(world: World) -> None:
    lines = [world.raw() for _ in range(6)]
    for index, line in enumerate(lines):
        line.sendall(HEAD[:20] if index % 2 else HEAD)
    world.good()
    for line in lines:
        answer = line.recv(1000)
        assert answer == b"" or b" 408 " in answer
        line.close()
    world.good()


def test_a_plain_caller_and_rubbish_are_let_go(world: World) -> None:
    with socket.create_connection(("127.0.0.1", world.port), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"200" not in plain.recv(100)
    for rubbish in (b"\x00" * 100, b"A" * 100_000, b"POST /v1/fleet/x HTTP/1.1\r\n" + b"a: b\r\n" * 9_000):
        with world.raw() as line:
            try:
                line.sendall(rubbish)
                while line.recv(4096):
                    pass
            except OSError:
                continue
    world.good()


def test_more_connections_than_there_are_places(world: World) -> None:
    lines = [world.raw() for _ in range(LIMITS.connections)]
    try:
        with pytest.raises((OSError, httpx.HTTPError)):
            world.good()
    finally:
        for line in lines:
            line.close()
    for _ in range(50):
        try:
            world.good()
        except httpx.HTTPError:
            continue
        return
    raise AssertionError("the places were not given back")


@given(junk=st.binary(min_size=1, max_size=400))
@settings(max_examples=25, deadline=None)
def test_any_bytes_leave_it_standing(world: World, junk: bytes) -> None:
    with world.raw() as line:
        line.sendall(junk)
        line.shutdown(socket.SHUT_WR)
    assert world.thread.is_alive()


def test_the_superlink_away(tmp_path: Path) -> None:
    made = make_federation(tmp_path / "f", "site-a")

    async def ask() -> int:
        gateway = Gateway(made.place, "127.0.0.1", 0, 1, LIMITS)
        port = await gateway.start()
        context = ssl.create_default_context(cafile=str(made.place.root / "ca.crt"))
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            reply = await client.post(f"https://127.0.0.1:{port}/v1/fleet/x", content=b"")
        await gateway.stop()
        return reply.status_code

    assert asyncio.run(ask()) == 503
