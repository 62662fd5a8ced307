"""One attempt at one call, with its bytes counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import grpc

from fednano.host.names import SERVICE
from fednano.host.wire import WireCount, parse

__all__ = ["Exchange"]


class _Message(Protocol):
    def SerializeToString(self) -> bytes: ...  # noqa: N802


M = TypeVar("M")


class Exchange:
    """An attempt. Messages are serialised here rather than by gRPC, so that what is counted is what is sent.

    Args:
        channel: open channel.
        name: of the call, such as ``"Step"``.
        metadata: sent with the call.
        timeout_s: deadline.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        name: str,
        metadata: tuple[tuple[str, str | bytes], ...],
        timeout_s: float,
    ) -> None:
        self._channel, self._path = channel, f"/{SERVICE}/{name}"
        self._metadata, self._timeout_s = metadata, timeout_s
        self._sent = self._received = 0
        self._call: Any = None

    def count(self, samples: int) -> WireCount:
        """What this attempt moved; ``samples`` is 0 if it failed."""
        return WireCount(self._sent, self._received, 1, samples)

    def unary(self, request: _Message, reply: type[M]) -> M:
        """Send one message, return the one reply.

        Raises:
            grpc.RpcError: the call failed.
        """
        data = request.SerializeToString()
        self._sent += len(data)
        call = self._channel.unary_unary(self._path, None, None)
        return self._parse(call(data, timeout=self._timeout_s, metadata=self._metadata), reply)

    def stream(self, requests: Iterator[_Message], reply: type[M]) -> Iterator[M]:
        """Send a stream of messages, iterate over the replies. gRPC takes the requests on a thread of its
        own.

        Raises:
            grpc.RpcError: the call failed; raised while iterating.
        """

        def outgoing() -> Iterator[bytes]:
            for request in requests:
                data = request.SerializeToString()
                self._sent += len(data)
                yield data

        call = self._channel.stream_stream(self._path, None, None)
        self._call = call(outgoing(), timeout=self._timeout_s, metadata=self._metadata)
        for data in self._call:
            yield self._parse(data, reply)

    def end(self) -> None:
        """Drop the call if it is still under way (a failed check, an interrupt)."""
        if self._call is not None:
            self._call.cancel()

    def _parse(self, data: bytes, reply: type[M]) -> M:
        self._received += len(data)
        message: Any = parse(data, reply.FromString)  # type: ignore[attr-defined]
        return message  # type: ignore[no-any-return]  # a ChunkFrame can do what is asked of a chunk
