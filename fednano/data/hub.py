"""Data sets of the Hugging Face Hub, and folders that `datasets` saved.

`datasets` downloads and converts once, then maps its Arrow files; images stay undecoded until they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fednano.data.options import DataOptions
from fednano.data.rows import Row, Table
from fednano.errors import DataError

__all__ = ["hub_table", "is_saved", "looks_like_hub", "saved_table"]

_TEST = ("test", "validation", "val", "dev")


def looks_like_hub(name: str) -> bool:
    """Whether a text can be the id of a data set on the Hub: ``owner/name`` or ``name``."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part[0] not in "./~" and " " not in part for part in parts)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def saved_table(folder: Path, name: str, split: str, options: DataOptions) -> Table | None:
    """The table of a folder that ``save_to_disk`` wrote; None where it has no such split. Raises DataError."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # `datasets` raises what its readers raise
        raise DataError(f"{folder} cannot be read: {_first_line(error)}. Save the data set again.") from error
    if isinstance(found, datasets.DatasetDict):
        picked = _pick(list(found), split, options)
        return None if picked is None else _table(found[picked], name, split, folder)
    return _table(found, name, split, folder) if split == "train" else None


def hub_table(name: str, split: str, options: DataOptions) -> Table | None:
    """The table of a data set on the Hub, or in its local cache; None where it has no such split.

    Raises:
        DataError: there is none of this name, or it cannot be reached.
    """
    import datasets

    subset = options.subset or None
    try:
        splits = datasets.get_dataset_split_names(name, subset)
        picked = _pick(splits, split, options)
        if picked is None:
            return None
        found = datasets.load_dataset(name, subset, split=picked)
    except Exception as error:  # of the Hub, of file readers, of the network: all become one message
        raise DataError(
            f"the data set {name!r} is neither a known name nor a folder or file here, and cannot be had from the "
            f"Hugging Face Hub: {_first_line(error)}. Check the name, or give a folder with train.jsonl, test.jsonl "
            "and images/."
        ) from error
    return _table(found, name, split, Path(name))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _pick(splits: list[str], split: str, options: DataOptions) -> str | None:
    """The split that stands for ``train`` or ``test``."""
    wanted = {"train": options.train, "test": options.test}.get(split, split)
    if wanted:
        if wanted not in splits:
            raise DataError(f"there is no split {wanted!r}; there are {', '.join(splits)}.")
        return wanted
    usual = _TEST if split == "test" else (split,)
    return next((each for each in usual if each in splits), None)


def _table(found: Any, name: str, split: str, file: Path) -> Table:
    import datasets

    classes: dict[str, tuple[str, ...]] = {}
    for column, feature in found.features.items():
        inner = getattr(feature, "feature", feature)  # a sequence of classes has its names inside
        if isinstance(inner, datasets.ClassLabel):
            classes[column] = tuple(inner.names)
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))

    def rows() -> Iterator[Row]:
        for number, values in enumerate(found, start=1):
            yield Row(number, {key: value for key, value in values.items() if value is not None})

    size = int(found.data.nbytes)
    return Table(name, split, file, rows, None, classes, (name, str(found._fingerprint)), size)
