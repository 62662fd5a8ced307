"""An append-only file of JSON lines, each with the hash of the one before and a signature.

A line that is changed, left out, moved or put in breaks the chain at that place. Lines cut off at the end leave a valid
shorter chain: whoever wants to notice that keeps the head (`Chain.head`) somewhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednano.errors import ReceiptInvalid, RunError
from fednano.runs.atomic import disk_advice
from fednano.security.canonical import canonical, parse_canonical, sha256_hex
from fednano.security.keys import Signer, valid_signature

__all__ = ["Chain"]

_OWN = frozenset({"index", "previous", "signature"})


@dataclass(frozen=True)
class Chain:
    """One such file.

    Attributes:
        path: the file.
        purpose: what its signatures are for; they are worth nothing in a chain of another purpose.
        name: whose chain it is, such as a run's id; part of what the first line names as its predecessor.
        fields: what each entry holds beside ``index``, ``previous`` and ``signature``.
        mend: what finishes an append that was cut off, for the message about it.
    """

    path: Path
    purpose: str
    name: str
    fields: frozenset[str]
    mend: str

    @property
    def genesis(self) -> str:
        """What the first line names as its predecessor."""
        return sha256_hex(canonical([f"fednano {self.purpose}", self.name]))

    def head(self) -> tuple[int, str]:
        """Number of complete lines, and the hash that the next line must name.

        Raises:
            ReceiptInvalid: the chain is broken.
        """
        lines = self._lines(torn=True)
        return len(lines), sha256_hex(lines[-1]) if lines else self.genesis

    def tail(self) -> tuple[int, int, str]:
        """Bytes of the complete lines, their number, and the hash that the next must name, from the last line alone.

        The lines before it are not looked at, so this takes as long for a long chain as for a short one.

        Raises:
            ReceiptInvalid: the last line is not one of this chain.
        """
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                start, rest = size, b""
                while start and rest.count(b"\n") < 2:
                    step = min(start, 1 << 16)
                    start -= step
                    file.seek(start)
                    rest = file.read(step) + rest
        except FileNotFoundError:
            return 0, 0, self.genesis
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {error.strerror}.") from error
        *lines, torn = rest.split(b"\n")
        if not lines:
            return 0, 0, self.genesis
        problem = self._shape(lines[-1])
        if problem:
            raise ReceiptInvalid(f"{self.path}, last line: {problem}.")
        return size - len(torn), parse_canonical(lines[-1])["index"] + 1, sha256_hex(lines[-1])

    def line(self, signer: Signer, body: Mapping[str, Any], *, index: int, previous: str) -> bytes:
        """A signed line with ``body``, to be appended as number ``index``."""
        entry = {**body, "index": index, "previous": previous}
        return canonical({**entry, "signature": signer.sign(self.purpose, canonical(entry))})

    def append(self, line: bytes) -> None:
        """Append a line; one that is there already is left alone, so that a cut-off append can be repeated.

        Raises:
            ReceiptInvalid: another line stands in its place.
            RunError: the disk is full; then the chain is as before.
        """
        entry = parse_canonical(line)
        lines = self._lines(torn=True)
        if entry["index"] < len(lines):
            if lines[entry["index"]] != line:
                raise ReceiptInvalid(
                    f"{self.path}, line {entry['index'] + 1} is not the line that was to stand there."
                )
            return
        self.write(line, sum(len(each) + 1 for each in lines))

    def write(self, line: bytes, whole: int) -> None:
        """Write a line after the first ``whole`` bytes; what a killed process left behind them of a line goes.

        Raises:
            RunError: the disk is full; then the chain is as before.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0)
            handle = os.open(self.path, flags, 0o600)
            try:
                os.ftruncate(handle, whole)
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
            public: the signer's public key, hexadecimal.

        Returns:
            The entries.

        Raises:
            ReceiptInvalid: which line is wrong, and how.
        """
        entries: list[dict[str, Any]] = []
        for number, line in enumerate(self._lines(torn=False), start=1):
            entry = parse_canonical(line)
            body = {name: value for name, value in entry.items() if name != "signature"}
            if not valid_signature(public, self.purpose, canonical(body), str(entry["signature"])):
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
                f"{self.path} ends within a line. If a process was killed, finish its work with: {self.mend}"
            )
        previous = self.genesis
        for number, line in enumerate(lines):
            problem = self._problem(line, number, previous)
            if problem:
                raise ReceiptInvalid(f"{self.path}, line {number + 1}: {problem}.")
            previous = sha256_hex(line)
        return lines

    def _shape(self, line: bytes) -> str:
        try:
            entry = parse_canonical(line)
        except ValueError as error:
            return str(error)
        wanted = self.fields | _OWN
        if not isinstance(entry, Mapping) or set(entry) != wanted:
            return f"expected an object with {', '.join(sorted(wanted))}"
        if type(entry["index"]) is not int or entry["index"] < 0:
            return f"its number is {entry['index']!r}"
        return ""

    def _problem(self, line: bytes, number: int, previous: str) -> str:
        shape = self._shape(line)
        if shape:
            return shape
        entry = parse_canonical(line)
        if entry["index"] != number:
            return f"it is number {entry['index']}, expected number {number}"
        if entry.get("run", self.name) != self.name:
            return f"it is of run {entry['run']!r}, expected {self.name!r}"
        if entry["previous"] != previous:
            return "it does not follow the line before it"
        return ""
