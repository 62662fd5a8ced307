"""The append-only log: JSON lines, each with the hash of the one before and the server's signature.

A line that is changed, left out, moved or put in breaks the chain at that place. Lines cut off at the end leave a valid
shorter chain; the receipts that those lines were about show it, since each names its own place in the log.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednano.errors import ReceiptInvalid, RunError
from fednano.runs.atomic import disk_advice
from fednano.unlearning.jobs.canonical import canonical, parse_canonical, sha256_hex
from fednano.unlearning.jobs.job import timestamp
from fednano.unlearning.jobs.keys import Signer, valid_signature

__all__ = ["Ledger", "genesis"]

_PURPOSE = "unlearning log"
_FIELDS = {"index", "job", "kind", "previous", "run", "sha256", "signature", "time"}


def genesis(run: str) -> str:
    """What the first line of a run's log names as its predecessor."""
    return sha256_hex(canonical(["fednano unlearning log", run]))


@dataclass(frozen=True)
class Ledger:
    """The log of one run.

    Attributes:
        path: the file.
        run: id of the run.
    """

    path: Path
    run: str

    def head(self) -> tuple[int, str]:
        """Number of complete lines, and the hash that the next line must name.

        Raises:
            ReceiptInvalid: the chain is broken.
        """
        lines = self._lines(torn=True)
        return len(lines), sha256_hex(lines[-1]) if lines else genesis(self.run)

    def line(
        self, signer: Signer, kind: str, job: str, content: bytes, *, index: int, previous: str
    ) -> bytes:
        """A signed line about ``content`` (a receipt, a rollback, a purge), to be appended as number ``index``."""
        entry = {
            "index": index,
            "job": job,
            "kind": kind,
            "previous": previous,
            "run": self.run,
            "sha256": sha256_hex(content),
            "time": timestamp(),
        }
        return canonical({**entry, "signature": signer.sign(_PURPOSE, canonical(entry))})

    def append(self, line: bytes) -> None:
        """Append a line; one that is there already is left alone, so that a cut-off append can be repeated.

        Raises:
            ReceiptInvalid: another line stands in its place.
            RunError: the disk is full; then the log is as before.
        """
        entry = parse_canonical(line)
        lines = self._lines(torn=True)
        if entry["index"] < len(lines):
            if lines[entry["index"]] != line:
                raise ReceiptInvalid(
                    f"{self.path}, line {entry['index'] + 1} is not the line that was to stand there."
                )
            return
        whole = sum(len(each) + 1 for each in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
            handle = os.open(self.path, flags, 0o600)
            try:
                os.ftruncate(handle, whole)  # what a killed process left of a line
                os.lseek(handle, whole, os.SEEK_SET)
                content = line + b"\n"
                try:
                    while content:
                        content = content[os.write(handle, content) :]
                except OSError:
                    os.ftruncate(handle, whole)
                    raise
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {disk_advice(self.path.parent, len(line), error)}"
            ) from error

    def verify(self, public: str) -> list[dict[str, Any]]:
        """Check every line.

        Args:
            public: the server's public key, hexadecimal.

        Returns:
            The entries.

        Raises:
            ReceiptInvalid: which line is wrong, and how.
        """
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(self._lines(torn=False), start=1):
            entry = parse_canonical(line)
            body = {name: value for name, value in entry.items() if name != "signature"}
            if not valid_signature(public, _PURPOSE, canonical(body), str(entry["signature"])):
                raise ReceiptInvalid(f"{self.path}, line {number}: the signature is not the server's.")
            entries.append(entry)
        return entries

    def _lines(self, *, torn: bool) -> list[bytes]:
        """The lines, after their chain was checked; with ``torn`` an incomplete last one is left out."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}.") from error
        *lines, rest = content.split(b"\n")
        if rest and not torn:
            raise ReceiptInvalid(
                f"{self.path} ends within a line. If a process was killed, finish its work with: fednano unlearn run"
            )
        previous = genesis(self.run)
        for number, line in enumerate(lines):
            problem = _problem(line, number, previous, self.run)
            if problem:
                raise ReceiptInvalid(f"{self.path}, line {number + 1}: {problem}.")
            previous = sha256_hex(line)
        return lines


def _problem(line: bytes, number: int, previous: str, run: str) -> str:
    try:
        entry = parse_canonical(line)
    except ValueError as error:
        return str(error)
    if not isinstance(entry, Mapping) or set(entry) != _FIELDS:
        return f"expected an object with {', '.join(sorted(_FIELDS))}"
    if type(entry["index"]) is not int or entry["index"] != number or entry["run"] != run:
        return f"it is number {entry['index']!r} of run {entry['run']!r}, expected number {number} of {run!r}"
    if entry["previous"] != previous:
        return "it does not follow the line before it"
    return ""
