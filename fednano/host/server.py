"""A running host: the service, its pool, its port.

`HostServer` lives on an event loop; `serve` runs one on a thread of its own for callers without a loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fednano.errors import ConfigError
from fednano.host.kept import KeptSamples
from fednano.host.limits import HostLimits
from fednano.host.names import CHUNK_BYTES, SERVICE
from fednano.host.pool import ComputePool
from fednano.host.proto import language_host_pb2_grpc as pb_grpc
from fednano.host.security import HostSecurity
from fednano.host.service import LanguageHost
from fednano.host.stats import Stats
from fednano.host.wire import parse
from fednano.models.language import LocalLLM

__all__ = ["HostServer", "RunningHost", "serve"]

log = logging.getLogger(__name__)

_OPTIONS = (
    # Otherwise a second host on the same port would start, and the kernel would deal calls out between them.
    ("grpc.so_reuseport", 0),
    # Clients ping through long computations, when no data flows.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Calls of one connection at a time; more wait in the connection, where they cost the host nothing.
    ("grpc.max_concurrent_streams", 256),
)


class _Bytes:
    """Registers methods with a server so that they may also answer in messages that are serialised already, and so that
    chunks are not parsed."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Nothing: the methods come by name as well."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """See `grpc.aio.Server`."""
        loose = {
            name: handler._replace(
                response_serializer=partial(_serialised, handler.response_serializer),
                request_deserializer=partial(parse, whole=handler.request_deserializer)
                if handler.request_streaming
                else handler.request_deserializer,
            )
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, loose),))


def _serialised(serialise: Callable[[Any], bytes], message: Any) -> bytes:
    return message if isinstance(message, bytes) else serialise(message)


class HostServer:
    """A language host on the running event loop. Start it once, stop it once.

    Args:
        llm: the model.
        listen: ``HOST:PORT``; port 0 takes a free one. ``[HOST]:PORT`` for IPv6.
        security: TLS and tokens.
        limits: bounds on requests.
        workers: computations at one time.
        threads: torch threads of each; ``None`` leaves torch's setting alone.
        chunk_bytes: size of the chunks of a reply, at most 4 MiB less a few bytes.
        kept: keeps the samples of the factored exchange; closed with the server. ``None`` makes one of default size.
        batch_tokens: most tokens of a batch of several clients' steps; 0 computes each request alone, see
            `fednano.host.batching.StepBatcher`.
        linger_seconds: longest wait of a step for company, see there.
        keep_graphs: label-private steps that wait with their graphs, see `fednano.host.private_compute.Graphs`.

    Raises:
        ConfigError: a bad number, or an address that other machines can reach without TLS.
    """

    def __init__(
        self,
        llm: LocalLLM,
        *,
        listen: str = "127.0.0.1:0",
        security: HostSecurity | None = None,
        limits: HostLimits | None = None,
        workers: int = 1,
        threads: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        batch_tokens: int = 0,
        linger_seconds: float = 0.0,
        kept: KeptSamples | None = None,
        keep_graphs: int = 8,
    ) -> None:
        self._listen, self._security, self._limits = (
            listen,
            security or HostSecurity(),
            limits or HostLimits(),
        )
        host, colon, port = listen.rpartition(":")
        if not (colon and host and port.isdigit() and int(port) < 65_536):
            raise ConfigError(
                f"listen: got {listen!r}, expected HOST:PORT, such as 127.0.0.1:50051, or port 0 for any"
            )
        self._credentials = self._security.credentials(listen)
        self._llm = llm
        self.stats = Stats()
        self._pool = ComputePool(self._limits, self.stats, workers=workers, threads=threads)
        self._kept = kept if kept is not None else KeptSamples()
        self._service = LanguageHost(
            llm,
            self._pool,
            self._limits,
            self.stats,
            verifier=self._security.verifier,
            chunk_bytes=chunk_bytes,
            batch_tokens=batch_tokens,
            linger_seconds=linger_seconds,
            kept=self._kept,
            keep_graphs=keep_graphs,
        )
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]

    def counters(self) -> dict[str, int]:
        """All counters: `fednano.host.stats.Stats`, `fednano.host.kept.KeptSamples.counters`, and of CUDA graphs. From
        any thread."""
        graphs = self._llm.passes.graphs
        found = {**self.stats.snapshot(), **self._kept.counters()}
        return (
            found if graphs is None else found | {"cuda_graphs": len(graphs), "cuda_graph_bytes": graphs.held}
        )

    async def start(self) -> str:
        """Bind and serve.

        Returns:
            The bound address ``HOST:PORT``.

        Raises:
            ConfigError: the port is taken, or the address is not one of this machine.
        """
        server = grpc.aio.server(options=_OPTIONS)
        pb_grpc.add_LanguageHostServicer_to_server(self._service, _Bytes(server))  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        # Clients such as grpcurl ask a server for its schema; it is no secret.
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._listen)
            else:
                port = server.add_secure_port(self._listen, self._credentials)
        except RuntimeError as error:
            await self._pool.close()
            raise ConfigError(
                f"cannot listen at {self._listen}: the port is taken, or the address is not one of this machine. "
                "Choose another port, 0 for any free one"
            ) from error
        await server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._server = server
        address = f"{self._listen.rpartition(':')[0]}:{port}"
        if self._security.tls:
            log.info("language host at %s (TLS)", address)
        else:
            log.warning("language host at %s without TLS: for this machine only", address)
        if self._security.verifier is None:
            log.warning("language host at %s admits callers without a token", address)
        return address

    async def stop(self, grace: float = 10.0) -> None:
        """Take no new calls, give those under way ``grace`` seconds, then end them."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace)
            self._server = None
        await self._pool.close()
        self._kept.close()


@dataclass(frozen=True)
class RunningHost:
    """A host on a thread of this process.

    Attributes:
        address: ``HOST:PORT`` that it is bound to.
    """

    address: str
    _server: HostServer

    def stats(self) -> dict[str, int]:
        """Counters, see `fednano.host.stats.Stats`."""
        return self._server.counters()


@contextmanager
def serve(
    llm: LocalLLM,
    *,
    listen: str = "127.0.0.1:0",
    security: HostSecurity | None = None,
    limits: HostLimits | None = None,
    workers: int = 1,
    threads: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    batch_tokens: int = 0,
    linger_seconds: float = 0.0,
    kept: KeptSamples | None = None,
    keep_graphs: int = 8,
    grace: float = 10.0,
) -> Iterator[RunningHost]:
    """Run a host on a thread for the length of a ``with`` block. Arguments and errors as for `HostServer`.

    Args:
        grace: seconds that calls under way are given when the block ends.
    """
    server = HostServer(
        llm,
        listen=listen,
        security=security,
        limits=limits,
        workers=workers,
        threads=threads,
        chunk_bytes=chunk_bytes,
        batch_tokens=batch_tokens,
        linger_seconds=linger_seconds,
        kept=kept,
        keep_graphs=keep_graphs,
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="language-host-loop")
    thread.start()
    try:
        address = asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        try:
            yield RunningHost(address, server)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(grace), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
