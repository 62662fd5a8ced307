"""Reading files that another process writes, and that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Tail", "read_object"]


class Tail:
    """The objects of a JSON Lines file that grows; each call reads only what is new.

    A line that is no object is left out and counted in ``problems``, because the rest of a run is still worth seeing.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._line = 0
        self._mark: tuple[int, bytes] = (0, b"")
        self.rows: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def read(self) -> list[dict[str, Any]]:
        """All objects so far."""
        try:
            with self._path.open("rb") as file:
                self._catch_up(file.seek(0, 2), file)
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            self._forget()
            self.problems = [f"{self._path.name} cannot be read: {error.strerror}"]
        return self.rows

    def _forget(self) -> None:
        self._offset = self._line = 0
        self._mark = (0, b"")
        self.rows, self.problems = [], []

    def _catch_up(self, size: int, file: Any) -> None:
        place, before = self._mark
        file.seek(place)
        # A resumed run cuts a torn line off, and another file may take the old one's place.
        if size < self._offset or file.read(len(before)) != before:
            self._forget()
        file.seek(self._offset)
        content: bytes = file.read(size - self._offset)
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.split(b"\n")[:-1]:
            self._line += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                self.rows.append(row)
            else:
                self.problems.append(f"{self._path.name}, line {self._line} is damaged and left out")
        self._offset += len(whole)
        if whole:
            last = whole[-64:]
            self._mark = (self._offset - len(last), last)


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON file that should hold an object; an empty one where it does not, with a line in ``problems``.

    A file that is not there (yet) is no problem.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or 'not JSON'}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold an object")
        return {}
    return value
