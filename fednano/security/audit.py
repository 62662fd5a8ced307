"""The audit log of a server: who joined, which update was taken or refused and why, tokens, runs, jobs, exports.

A signed chain (`fednano.security.chain`), written by several processes in turn. Lines cut off at the end leave a valid
shorter chain, so copy the head that ``fednano audit verify`` prints to where the server's operator cannot write, and
give it back with ``--head``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fednano.errors import ReceiptInvalid
from fednano.security.canonical import canonical, sha256_hex
from fednano.security.chain import Chain
from fednano.security.keys import Signer, load_signer

__all__ = ["AuditLog", "Auditor", "locked"]


@dataclass(frozen=True)
class AuditLog:
    """The log of one server.

    Attributes:
        path: the file; its lock lies beside it.
        federation: name of the federation.
    """

    path: Path
    federation: str

    @property
    def chain(self) -> Chain:
        """The file as a chain."""
        fields = frozenset({"details", "kind", "time"})
        return Chain(self.path, "audit log", self.federation, fields, "fednano server up")

    def record(self, signer: Signer, kind: str, **details: Any) -> None:
        """Append an event and flush it to the disk.

        Args:
            signer: the server's audit key.
            kind: such as ``"update refused"``.
            details: JSON values.

        Raises:
            RunError: the disk is full.
            ReceiptInvalid: the end of the log is damaged.
        """
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            whole, index, previous = self.chain.tail()
            body = {"details": details, "kind": kind, "time": now}
            self.chain.write(self.chain.line(signer, body, index=index, previous=previous), whole)

    def verify(self, public: str, head: str = "") -> list[dict[str, Any]]:
        """Check every line.

        Args:
            public: the audit key's public half, hexadecimal.
            head: ``NUMBER:HASH`` of an earlier verification; the log must still contain it.

        Returns:
            The entries.

        Raises:
            ReceiptInvalid: what is wrong, and where.
        """
        entries = self.chain.verify(public)
        if head:
            number, _, digest = head.partition(":")
            kept = int(number) if number.isdigit() else 0
            if not 0 < kept <= len(entries) or sha256_hex(canonical(entries[kept - 1])) != digest:
                raise ReceiptInvalid(
                    f"{self.path} does not contain the head {head}: lines that were there then are gone or changed."
                )
        return entries

    def head(self) -> str:
        """``NUMBER:HASH`` of the last line."""
        count, digest = self.chain.head()
        return f"{count}:{digest}"


@dataclass(frozen=True)
class Auditor:
    """Somebody who may write into a log: the log and the key. Records nothing without a log."""

    log: AuditLog | None = None
    key: Path | None = None

    def record(self, kind: str, **details: Any) -> None:
        """See `AuditLog.record`."""
        if self.log is not None and self.key is not None:
            self.log.record(load_signer(self.key), kind, **details)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, which the system releases when its holder dies."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
