"""Bytes and samples that a client really moved."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from fednano.host.planes import squeeze

__all__ = [
    "ChunkFrame",
    "Meter",
    "Wire",
    "WireCount",
    "chunk_message",
    "coded_message",
    "parse",
]

_CHUNK_TAG, _CODED_TAG = b"\x12", b"\x22"
"""Fields 2 and 4, bytes: what a chunk and a coded one are in every message that has one."""
_KINDS_OF_TAG = {_CHUNK_TAG[0]: "chunk", _CODED_TAG[0]: "coded"}
_SMALL = 4096
M = TypeVar("M")


def chunk_message(part: memoryview) -> bytes:
    """The serialised message that holds ``part`` as its chunk, made with one copy.

    Protobuf makes several, which at a megabyte a message is most of what an event loop does.
    """
    return b"".join((_CHUNK_TAG, _varint(len(part)), part))


def coded_message(part: memoryview) -> bytes:
    """The same with ``part`` coded, where that makes it shorter."""
    coded = squeeze(part)
    return chunk_message(part) if coded is None else b"".join((_CODED_TAG, _varint(len(coded)), coded))


class ChunkFrame:
    """A received message that holds one ``chunk`` or ``coded`` and nothing else; looks like the one of protobuf."""

    __slots__ = ("_kind", "_size", "_view")

    def __init__(self, kind: str, view: memoryview, size: int) -> None:
        self._kind, self._view, self._size = kind, view, size

    def WhichOneof(self, _: str) -> str:  # noqa: N802
        """``"chunk"`` or ``"coded"``."""
        return self._kind

    @property
    def chunk(self) -> memoryview:
        """What it holds, where gRPC has put it."""
        return self._view

    coded = chunk

    def ByteSize(self) -> int:  # noqa: N802
        """Length of the whole message."""
        return self._size


def parse(data: bytes, whole: Callable[[bytes], M]) -> M | ChunkFrame:
    """A received message. A large one that is but a chunk is not copied, as protobuf does twice.

    Args:
        data: serialised.
        whole: parses any message of its kind.
    """
    if len(data) > _SMALL and (kind := _KINDS_OF_TAG.get(data[0])) is not None:
        length = 0
        for at in range(1, 6):  # a varint of five bytes holds 2**35
            length |= (data[at] & 127) << (7 * (at - 1))
            if data[at] < 128:
                break
        if at + 1 + length == len(data):
            return ChunkFrame(kind, memoryview(data)[at + 1 :], len(data))
    return whole(data)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


@dataclass(frozen=True)
class WireCount:
    """What one kind of call moved so far, repeated attempts included.

    Attributes:
        sent_bytes: serialised messages handed to gRPC (without its framing: 5 bytes a message, and HTTP/2 and
        TLS). received_bytes: serialised messages taken from it.
        calls: attempts.
        samples: samples of the calls that succeeded.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    calls: int = 0
    samples: int = 0

    def __add__(self, other: WireCount) -> WireCount:
        return WireCount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(WireCount)))

    def __sub__(self, other: WireCount) -> WireCount:
        return WireCount(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(WireCount)))


@dataclass(frozen=True)
class Wire:
    """What a client moved so far, by kind of call. Its own attributes are the totals."""

    step: WireCount = WireCount()
    generate: WireCount = WireCount()
    other: WireCount = WireCount()

    @property
    def total(self) -> WireCount:
        """All calls together."""
        return self.step + self.generate + self.other

    @property
    def sent_bytes(self) -> int:
        """Bytes sent by all calls."""
        return self.total.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes received by all calls."""
        return self.total.received_bytes

    @property
    def calls(self) -> int:
        """Attempts of all calls."""
        return self.total.calls

    @property
    def samples(self) -> int:
        """Samples of all calls that succeeded."""
        return self.total.samples


_KINDS = {
    "step": "step",
    "factoredstep": "step",
    "privatestep": "step",
    "keep": "step",
    "generate": "generate",
}
"""What a call counts as. Keeping a sample is part of what its steps cost."""


class Meter:
    """Adds up counts from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wire = Wire()

    def add(self, call: str, count: WireCount) -> None:
        """Add ``count`` to a kind of call: see `_KINDS`; all else counts as other."""
        kind = _KINDS.get(call, "other")
        with self._lock:
            self._wire = replace(self._wire, **{kind: getattr(self._wire, kind) + count})

    def read(self) -> Wire:
        """A snapshot."""
        with self._lock:
            return self._wire
