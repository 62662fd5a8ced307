"""From rows to a data set: every row is used, or counted and named with its file, its line and what is wrong.

Small data is held in memory. What is larger than ``MAP_BYTES`` passes through once, a row at a time, into a
memory-mapped file (`fednano.data.store`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fednano.data.kinds import KINDS, Kind, Reading, detect, text_of
from fednano.data.options import DataOptions
from fednano.data.rows import BadRowError, Row, Table
from fednano.data.sample import BadRow, Dataset, Sample
from fednano.data.store import cache_folder, open_store, write_store
from fednano.errors import DataError

__all__ = ["MAP_BYTES", "image_reader", "read_dataset"]

MAP_BYTES = 64 * 2**20
"""Sources larger than this are kept in a memory-mapped file."""

_log = logging.getLogger("fednano.data")
_SHOWN = 5
_KEPT = 1000  # bad rows that are named; the rest is counted
_LOOKED_AT = 32  # rows whose columns decide the kind


def read_dataset(
    table: Table, options: DataOptions | None = None, kind: str = "auto", *, strict: bool = False
) -> Dataset:
    """Read a table.

    Args:
        table: the rows.
        options: which column is what.
        kind: a name in `KINDS`, or ``"auto"``: by the columns.
        strict: refuse the data at the first bad row instead of leaving the row out.

    Returns:
        The good rows in the table's order. Ids are the rows' own, or ``"<name>/<split>/<line>"``.

    Raises:
        DataError: nothing can be used, no kind fits, or a row is bad and ``strict`` is set.
    """
    options = options or DataOptions()
    if kind != "auto" and kind not in KINDS:
        raise DataError(f"data-kind is {kind!r}; expected auto or one of {', '.join(KINDS)}.")
    kind = table.kind if kind == "auto" else kind
    mapped = options.map or table.size > MAP_BYTES
    stamp = (*table.stamp, table.name, table.split, kind, str(sorted(asdict(options).items())))
    if mapped and not strict and (kept := open_store(stamp)) is not None:
        facts = kept.facts
        bad = [BadRow(Path(row[0]), row[1], row[2]) for row in facts["bad"]]
        _report(table, bad, facts["bad_count"], len(kept), strict=False)
        return Dataset(table.name, table.split, kept, tuple(bad), facts["kind"])
    if kind == "auto":
        seen = [set(row.values) for row in islice((r for r in table.rows() if not r.problem), _LOOKED_AT)]
        kind = detect(set().union(*seen), options, table.file) if seen else "vqa"
    state = _State(table, options, KINDS[kind])
    found: Any = ()
    if mapped:
        found = write_store(
            stamp,
            state.samples(),
            lambda: {
                "kind": kind,
                "bad_count": state.bad_count,
                "bad": [(str(row.file), row.line, row.reason) for row in state.bad],
            },
        )
    else:
        found = tuple(state.samples())
    _report(table, state.bad, state.bad_count, len(found), strict=strict)
    return Dataset(table.name, table.split, found, tuple(state.bad), kind)


@dataclass
class _State:
    """What one pass over a table has met."""

    table: Table
    options: DataOptions
    kind: Kind
    bad: list[BadRow] = field(default_factory=list)
    bad_count: int = 0
    ids: set[bytes] = field(default_factory=set)

    def samples(self) -> Iterator[Sample]:
        reading = Reading(self.options, self.table.classes, image_reader(self.table.root))
        for row in self.table.rows():
            try:
                yield from self._convert(row, reading)
            except BadRowError as error:
                self.bad_count += 1
                if len(self.bad) < _KEPT:
                    self.bad.append(BadRow(row.file or self.table.file, row.line, str(error)))

    def _convert(self, row: Row, reading: Reading) -> list[Sample]:
        if row.problem:
            raise BadRowError(row.problem)
        column = self.options.id or "id"
        own = row.values.get(column)
        if isinstance(own, int) and not isinstance(own, bool) and self.table.file.suffix != ".jsonl":
            own = str(own)
        identity = f"{self.table.name}/{self.table.split}/{row.line:05d}"
        if own is not None:
            identity = text_of(own, column)
        samples = self.kind.convert(row.values, identity, reading)
        if own is not None:
            key = hashlib.blake2b(identity.encode(), digest_size=12).digest()
            if key in self.ids:
                raise BadRowError(f"id {identity!r} was used before; ids must be unique")
            self.ids.add(key)
        if self.options.group:
            value = row.values.get(self.options.group)
            if value is None:
                raise BadRowError(f"{self.options.group} is missing, by which the data is to be divided")
            names = self.table.classes.get(self.options.group, ())
            group = names[value] if names and isinstance(value, int) else str(value)
            samples = [replace(sample, group=group) for sample in samples]
        return samples


def _report(table: Table, bad: list[BadRow], count: int, good: int, *, strict: bool) -> None:
    if bad:
        listed = "\n  ".join(str(row) for row in bad[:_SHOWN])
        more = f"\n  and {count - _SHOWN} more" if count > _SHOWN else ""
        message = f"{count} of {count + good} rows of {table.file} cannot be used:\n  {listed}{more}"
        if strict or not good:
            raise DataError(f"{message}\nCorrect or remove these rows.")
        _log.warning("%s", message)
    if not good:
        raise DataError(f"{table.file} holds no rows. Write at least one question to it.")


def image_reader(root: Path | None) -> Callable[[Any], Path | None]:
    """How a row's image becomes a file: a path below ``root``, or bytes, which are kept in the cache folder."""
    base = root.resolve() if root is not None else None

    def read(value: Any) -> Path | None:
        if value is None or value == "":
            return None
        if isinstance(value, Mapping):  # as Parquet and Arrow files hold images: bytes, path, or both
            if isinstance(value.get("bytes"), bytes):
                return _keep(value["bytes"])
            value = value.get("path")
        if isinstance(value, bytes):
            return _keep(value)
        return _below(text_of(value, "image"), base)

    return read


def _keep(content: bytes) -> Path:
    name = hashlib.sha256(content).hexdigest()
    file = cache_folder() / "images" / name[:2] / name
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = file.with_suffix(".part")
            partial.write_bytes(content)
            partial.replace(file)
        except OSError as error:
            raise DataError(
                f"an image cannot be kept in {file.parent}: {error.strerror}. Make room there, or set FEDNANO_CACHE."
            ) from error
    return file


def _below(name: str, root: Path | None) -> Path:
    if "\0" in name:
        raise BadRowError("image holds a zero byte")
    if root is None:
        raise BadRowError(f"image {name!r:.80} is a path, but this data brings no folder of images")
    for base in (root / "images", root):
        path = (base / name).resolve()
        if not path.is_relative_to(root):
            raise BadRowError(f"image {name!r} lies outside the data folder; put it below {root / 'images'}")
        if path.is_file():
            return path
    raise BadRowError(f"image {name!r} does not exist below {root / 'images'} or {root}")
