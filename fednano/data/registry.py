"""Data sets by name or by folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fednano.data.easy_vqa import load_easy_vqa
from fednano.data.sample import Dataset
from fednano.data.vqa_jsonl import load_vqa_jsonl
from fednano.errors import DataError

__all__ = ["dataset_names", "load_dataset"]

# name -> loader of a split; a further data set is one function and one line here
_LOADERS: dict[str, Callable[[str], Dataset]] = {"easy-vqa": load_easy_vqa}


def dataset_names() -> list[str]:
    """The names that ``load_dataset`` knows, sorted."""
    return sorted(_LOADERS)


def load_dataset(name_or_path: str | Path, split: str = "train") -> Dataset:
    """Load a data set by its name, or from a folder in the layout of ``fednano.data.vqa_jsonl``.

    Args:
        name_or_path: a name of ``dataset_names()``, or a folder. A known name wins over a folder of that
            name; write ``./name`` for the folder.
        split: ``"train"`` or ``"test"``.

    Returns:
        The data set. Its ``bad_rows`` tells what was left out.

    Raises:
        DataError: neither a known name nor a folder, or the data cannot be read.
    """
    if isinstance(name_or_path, str) and name_or_path in _LOADERS:
        return _LOADERS[name_or_path](split)
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"Unknown data set {str(name_or_path)!r}: it is neither a known name "
            f"({', '.join(dataset_names())}) nor a folder. "
            "Give a folder with train.jsonl, test.jsonl and images/."
        )
    return load_vqa_jsonl(folder, split)
