"""Data sets by name, file, folder or Hugging Face id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fednano.data import hub, layouts
from fednano.data.easy_vqa import load_easy_vqa
from fednano.data.options import DataOptions
from fednano.data.reading import read_dataset
from fednano.data.rows import ENDINGS, Row, Table, table_of
from fednano.data.sample import Dataset
from fednano.errors import DataError

__all__ = ["TEST_EVERY", "dataset_names", "load_dataset"]

# name -> loader of a split; a further data set is one function and one line here
_LOADERS: dict[str, Callable[[str], Dataset]] = {"easy-vqa": load_easy_vqa}

TEST_EVERY = 10
"""Of data without a test split, every so many-th sample is kept for testing."""

_TEST_FILES = ("test", "validation", "val", "dev")


def dataset_names() -> list[str]:
    """The names that ``load_dataset`` knows, sorted."""
    return sorted(_LOADERS)


def load_dataset(
    name_or_path: str | Path,
    split: str = "train",
    *,
    kind: str = "auto",
    options: Mapping[str, Any] | DataOptions | None = None,
    strict: bool = False,
    whole: bool = False,
) -> Dataset:
    """Load a data set.

    Args:
        name_or_path: a name of ``dataset_names()``; a file (.jsonl, .json, .csv, .tsv, .parquet); a folder with
            ``train`` and ``test`` files of these kinds and ``images/``, with a folder of pictures for each class, in
            the layout of ScienceQA or IconQA, or written by ``datasets``; or an id on the Hugging Face Hub. A known
            name wins over a folder of that name; write ``./name`` for the folder.
        split: ``"train"`` or ``"test"``. Where a file, a folder of pictures or a data set of the Hub has no test split,
            every tenth sample is kept for it.
        kind: what the rows are, a name in `fednano.data.kinds.KINDS`; ``"auto"``: by their columns.
        options: which column is what, see `DataOptions`.
        strict: refuse bad rows instead of leaving them out.
        whole: train on every sample even where there is no test split, as an institution does with its own data.

    Returns:
        The data set. Its ``bad_rows`` tells what was left out.

    Raises:
        DataError: there is no such data, or it cannot be read.
    """
    how = options if isinstance(options, DataOptions) else DataOptions.from_mapping(options or {})
    if isinstance(name_or_path, str) and name_or_path in _LOADERS:
        if how.group:
            raise DataError(
                f"{name_or_path} has no columns to divide it by; partition-by is {how.group!r}. Leave it out."
            )
        return _LOADERS[name_or_path](split)
    source = _source(str(name_or_path), Path(name_or_path).expanduser(), how)
    table = source.find(split)
    if table is not None and (not source.divided or split == "test" or whole or source.find("test")):
        return read_dataset(table, how, kind, strict=strict)
    everything = source.find("train") if source.divided and split in ("train", "test") else None
    if everything is None:
        raise DataError(source.lacks(split))
    found = read_dataset(everything, how, kind, strict=strict)
    tested = range(TEST_EVERY - 1, len(found), TEST_EVERY) if len(found) >= TEST_EVERY else [len(found) - 1]
    if split == "test":
        return replace(found.subset(tested), split="test")
    kept = set(tested)
    return found.subset([place for place in range(len(found)) if place not in kept])


@dataclass(frozen=True)
class _Source:
    """Where a data set's rows are.

    Attributes:
        find: split to its table; None where there is no such split.
        lacks: split to the message that there is none.
        divided: whether training data is divided where there is no test split.
    """

    find: Callable[[str], Table | None]
    lacks: Callable[[str], str]
    divided: bool = True


def _source(name: str, path: Path, how: DataOptions) -> _Source:
    def lacks(split: str) -> str:
        return f"the data set {name!r} has no split {split!r}. Name it with --data-options '{split}=\"...\"'."

    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise DataError(f"{path} ends in {path.suffix!r}; expected {', '.join(ENDINGS)}, or a folder.")
        return _Source(lambda split: _file_table(path, split, how), lacks)
    if not path.is_dir():
        if hub.looks_like_hub(name):
            return _Source(cache(lambda split: hub.hub_table(name, split, how)), lacks)
        raise DataError(
            f"Unknown data set {name!r}: it is neither a known name ({', '.join(dataset_names())}) nor a folder or "
            "file that exists. Give a folder with train.jsonl, test.jsonl and images/."
        )
    own = path.resolve().name
    if (release := layouts.is_problems(path)) is not None:
        names = {"train": how.train or "train", "test": how.test or "test"}
        return _Source(lambda split: layouts.problems(release, own, names.get(split, split)), lacks, False)
    if hub.is_saved(path):
        return _Source(lambda split: hub.saved_table(path, own, split, how), lacks)
    if not _files(path, "train", how) and not _files(path, "test", how) and layouts.is_image_folder(path):
        return _Source(lambda split: layouts.image_folder(path, own, split), lacks)
    return _Source(
        lambda split: _folder_table(path, own, split, how), lambda split: _no_file(path, split), False
    )


def _file_table(path: Path, split: str, how: DataOptions) -> Table | None:
    """A file's table as training data; as test data the file beside it that ``test`` names."""
    if split == "train":
        return table_of(path, path.stem, split, path.parent)
    if split == "test" and how.test:
        other = path.parent / Path(how.test).name
        if not other.is_file() or other.suffix.lower() not in ENDINGS:
            raise DataError(f"the test file {other} does not exist, or ends in none of {', '.join(ENDINGS)}.")
        return table_of(other, path.stem, split, path.parent)
    return None


def _files(folder: Path, split: str, how: DataOptions) -> list[Path]:
    """The files of a split: one, or the numbered parts that `datasets` writes."""
    given = {"train": how.train, "test": how.test}.get(split, "")
    stems = (Path(given).stem,) if given else _TEST_FILES if split == "test" else (split,)
    for stem in stems:
        if stem != Path(stem).name:
            continue
        for ending in ENDINGS:
            if (folder / f"{stem}{ending}").is_file():
                return [folder / f"{stem}{ending}"]
        for base in (folder, folder / "data"):
            if parts := sorted(base.glob(f"{stem}-*-of-*.parquet")):
                return parts
    return []


def _folder_table(folder: Path, name: str, split: str, how: DataOptions) -> Table | None:
    files = _files(folder, split, how)
    if not files:
        return None
    tables = [table_of(file, name, split, folder.resolve()) for file in files]
    if len(tables) == 1:
        return tables[0]

    def rows() -> Iterator[Row]:
        total = 0
        for table in tables:
            line = 0
            for row in table.rows():
                line = row.line
                yield replace(row, line=total + line, file=table.file)
            total += line

    stamp = tuple(part for table in tables for part in table.stamp)
    return replace(tables[0], rows=rows, stamp=stamp, size=sum(table.size for table in tables))


def _no_file(folder: Path, split: str) -> str:
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    return (
        f"Data folder {folder} has no {split}.jsonl (it has: {', '.join(found) or 'no .jsonl file'}), nor {split} in "
        f"another format ({', '.join(ENDINGS)}). Write one object a line: "
        '{"image": "cat.png", "question": "what animal is this?", "answer": "cat"}'
    )
