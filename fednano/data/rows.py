"""Rows of JSON Lines, JSON, CSV, TSV and Parquet files, one at a time, each with the line it stands on.

Nothing here holds more than a block of rows. What cannot be read as a row comes out as one with a ``problem``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fednano.errors import DataError

__all__ = ["ENDINGS", "BadRowError", "Row", "Table", "read_rows", "table_of"]


class BadRowError(Exception):
    """What is wrong with the row at hand."""


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        line: line in the file, from 1; in Parquet and JSON the number of the row.
        values: its columns.
        problem: why it is no row; empty where it is one.
        file: the file that it stands in, where that is not the table's.
    """

    line: int
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    file: Path | None = None


@dataclass(frozen=True)
class Table:
    """A source of rows that can be read again.

    Attributes:
        name: of the data set.
        split: of it.
        file: file that messages name.
        rows: starts reading from the first row.
        root: images lie below it; None where rows bring theirs.
        classes: column -> names of its classes, where it holds their numbers.
        stamp: what the content depends on; equal stamps, equal rows.
        size: bytes of the source, as far as known.
        kind: what the rows are, where the layout says so.
    """

    name: str
    split: str
    file: Path
    rows: Callable[[], Iterator[Row]]
    root: Path | None = None
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stamp: tuple[str, ...] = ()
    size: int = 0
    kind: str = "auto"


def table_of(file: Path, name: str, split: str, root: Path) -> Table:
    """A file's table.

    Args:
        file: ends in one of `ENDINGS`.
        name: of the data set.
        split: of it.
        root: folder that images lie in.
    """
    found = file.stat()
    stamp = (str(file.resolve()), str(found.st_size), str(found.st_mtime_ns))
    return Table(name, split, file, lambda: read_rows(file), root, {}, stamp, found.st_size)


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file, by its ending.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is no such file.
    """
    try:
        yield from ENDINGS[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue  # an empty line carries nothing that could be lost
            try:
                yield _object(number, json.loads(line))
            except ValueError as error:
                yield Row(number, problem=f"not JSON: {error}")
            except RecursionError:
                yield Row(number, problem="not JSON that can be read: nested too deeply")


def _json(file: Path) -> Iterator[Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{file} is not JSON: {error}. Correct it there, or save one object a line as .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{file} holds {type(rows).__name__}; expected a list of objects.")
    yield from (_object(number, row) for number, row in enumerate(rows, start=1))


def _object(number: int, row: object) -> Row:
    if isinstance(row, dict):
        return Row(number, row)
    return Row(number, problem=f"expected an object with one entry a column, got {type(row).__name__}")


def _separated(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(file: Path) -> Iterator[Row]:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            header: list[str] | None = None
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Row(line, problem=f"not {file.suffix[1:].upper()}: {error}")
                    continue
                if not cells:
                    continue
                if header is None:
                    header = _header(cells, file)
                elif len(cells) != len(header):
                    yield Row(line, problem=f"has {len(cells)} cells, the header {len(header)}")
                else:  # an empty cell is a missing value
                    pairs = zip(header, cells, strict=True)
                    yield Row(line, {name: cell for name, cell in pairs if cell})

    return read


def _header(cells: list[str], file: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) != len(names) or not all(names):
        raise DataError(
            f"the first line of {file} is {','.join(cells)!r:.100}; expected the names of its columns, all different."
        )
    return names


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, memory_map=True) as source:
            number = 0
            for batch in source.iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, {name: value for name, value in values.items() if value is not None})
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is not Parquet: {error}. Write it again.") from error


ENDINGS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
"""File ending -> reader, in the order in which files of one split are preferred."""
