"""``metrics.jsonl``: one measurement a line, appended while the run goes on.

A line is handed to the system in one piece, so that killing the process leaves at most one torn line, at the
end. Readers skip it, and the next writer cuts it off.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fednano.errors import RunError
from fednano.runs.atomic import disk_advice, finite

__all__ = ["JsonLines", "check_metrics", "read_json_lines"]

SCOPES = ("global", "client")


class JsonLines:
    """Appends objects to a file, one a line. Safe to use from several threads.

    Args:
        path: the file; made at the first append. Its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._handle: int | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, complete in the system's hands when this returns.

        Floats that are not finite are written as null, and ``"non_finite"`` names their keys.

        Raises:
            RunError: the record holds something that JSON does not know, or the disk is full; then the file
                is as before.
        """
        row = dict(record)
        odd = sorted(key for key, value in row.items() if finite(value) is None and value is not None)
        if odd:
            row["non_finite"] = odd
        try:
            line = json.dumps(finite(row), ensure_ascii=True, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RunError(
                f"Cannot write to {self._path}: {error}. Give strings, numbers, lists, mappings."
            ) from error
        with self._lock:
            if self._handle is None:
                self._handle = self._open()
            end = os.fstat(self._handle).st_size
            try:
                done = 0
                while done < len(line):
                    done += os.write(self._handle, line[done:])
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, end)
                advice = disk_advice(self._path.parent, len(line), error)
                raise RunError(f"Cannot write to {self._path}: {advice}") from error

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            handle = os.open(self._path, flags, 0o644)
        except OSError as error:
            raise RunError(
                f"Cannot write to {self._path}: {disk_advice(self._path.parent, 0, error)}"
            ) from error
        # A process that was killed may have left part of a line. A new line must not be glued to it.
        content = self._path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.ftruncate(handle, content.rfind(b"\n") + 1)
        return handle


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file; a torn last line is skipped, a missing file has none.

    Raises:
        RunError: a line other than a torn last one is not an object; the message names it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    rows: list[dict[str, Any]] = []
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn, or nothing
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}, line {number} is damaged: {error}. Remove the line.") from error
        if not isinstance(row, dict):
            raise RunError(f"{path}, line {number} is damaged: expected an object. Remove the line.")
        rows.append(row)
    return rows


def check_metrics(record: Mapping[str, Any]) -> None:
    """Refuse a metrics record that readers could not place.

    Args:
        record: needs ``phase`` (non-empty string), ``round`` (whole number, 0 = before training) and ``scope``
            (``"global"`` or ``"client"``); with scope ``"client"`` also ``client``.

    Raises:
        RunError: one of these is missing or wrong.
    """
    phase, number, scope = record.get("phase"), record.get("round"), record.get("scope")
    if not isinstance(phase, str) or not phase:
        raise RunError(f"A metrics record needs 'phase', a non-empty string; got {phase!r}.")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise RunError(f"A metrics record needs 'round', a whole number of at least 0; got {number!r}.")
    if scope not in SCOPES:
        raise RunError(f"A metrics record needs 'scope', 'global' or 'client'; got {scope!r}.")
    if scope == "client" and not (isinstance(record.get("client"), str) and record["client"]):
        raise RunError(
            f"A metrics record of scope 'client' needs 'client', a name; got {record.get('client')!r}."
        )
