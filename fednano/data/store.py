"""Samples in a memory-mapped Arrow file: data larger than memory costs address space, not memory.

A row is read when somebody asks for it; the operating system keeps what is used. The file lies in the user's cache
folder under a name made from what its content depends on, so that the processes of a site share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from fednano.data.sample import Sample
from fednano.errors import DataError

__all__ = ["MappedSamples", "cache_folder", "open_store", "write_store"]

_BATCH = 1024
_VERSION = "1"
_COLUMNS = ("id", "image", "question", "answer", "group", "more")


def cache_folder() -> Path:
    """Where prepared data is kept: ``$FEDNANO_CACHE``, else ``fednano`` in the user's cache folder."""
    given = os.environ.get("FEDNANO_CACHE", "")
    base = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache")
    folder = Path(given).expanduser() if given else base / "fednano"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds the site's data
    return folder


class MappedSamples(Sequence[Sample]):
    """Samples of a file that `write_store` made.

    Args:
        file: the file.
    """

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self.file = file
        self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
        sizes = [self._reader.get_batch(n).num_rows for n in range(self._reader.num_record_batches)]
        self._ends = list(accumulate(sizes))
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        number = bisect_right(self._ends, index)
        held, batch = self._held
        if held != number:
            batch = self._reader.get_batch(number)
            self._held = (number, batch)  # one assignment: threads may read at the same time
        place = index - (self._ends[number - 1] if number else 0)
        identity, image, question, answer, group, more = (column[place].as_py() for column in batch.columns)
        extra = json.loads(more) if more else {}
        return Sample(
            identity,
            Path(image) if image else None,
            question,
            answer,
            tuple(extra.get("answers", ())),
            tuple((role, text) for role, text in extra.get("history", ())),
            group,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What was written beside the samples: kind and bad rows."""
        found: dict[str, Any] = json.loads(self.file.with_suffix(".json").read_text())
        return found


def _file_of(stamp: Sequence[str]) -> Path:
    name = hashlib.sha256("\0".join([_VERSION, *stamp]).encode()).hexdigest()[:32]
    return cache_folder() / "data" / f"{name}.arrow"


def open_store(stamp: Sequence[str]) -> MappedSamples | None:
    """The samples kept for this stamp, if they are there and whole."""
    import pyarrow as pa

    file = _file_of(stamp)
    try:
        found = MappedSamples(file) if file.with_suffix(".json").is_file() else None
        return found if found is not None and found.facts else None
    except (pa.ArrowInvalid, OSError, ValueError):
        return None  # damaged: made again


def write_store(
    stamp: Sequence[str], samples: Iterable[Sample], facts: Callable[[], dict[str, Any]]
) -> MappedSamples:
    """Write samples as they come, holding a batch of them at a time.

    Args:
        stamp: what the content depends on.
        samples: the samples.
        facts: what to write beside them, asked for when all samples were taken; JSON.

    Raises:
        DataError: the cache folder cannot be written.
    """
    import pyarrow as pa

    file = _file_of(stamp)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(dir=file.parent, suffix=".part")
        os.close(handle)
        try:
            plain = pa.schema([(name, pa.string()) for name in _COLUMNS])
            with pa.OSFile(partial, "wb") as sink, pa.ipc.new_file(sink, plain) as writer:
                rows: list[tuple[str, ...]] = []
                for sample in samples:
                    rows.append(_row(sample))
                    if len(rows) == _BATCH:
                        writer.write_batch(_record(pa, rows, plain))
                        rows = []
                if rows:
                    writer.write_batch(_record(pa, rows, plain))
            Path(partial).replace(file)
        finally:
            Path(partial).unlink(missing_ok=True)
        note = Path(f"{partial}.json")
        note.write_text(json.dumps(facts()))
        note.replace(file.with_suffix(".json"))  # last: without it the samples do not count
    except OSError as error:
        raise DataError(
            f"prepared data cannot be kept in {file.parent}: {error.strerror or error}. Make room there, or set "
            "FEDNANO_CACHE to a folder with room."
        ) from error
    return MappedSamples(file)


def _row(sample: Sample) -> tuple[str, ...]:
    extra = {"answers": sample.answers, "history": sample.history}
    more = json.dumps({key: value for key, value in extra.items() if value}, ensure_ascii=False)
    image = str(sample.image) if sample.image is not None else ""
    return sample.id, image, sample.question, sample.answer, sample.group, more if len(more) > 2 else ""


def _record(pa: Any, rows: Sequence[tuple[str, ...]], schema: Any) -> Any:
    return pa.record_batch(
        [pa.array(column, pa.string()) for column in zip(*rows, strict=True)], schema=schema
    )
