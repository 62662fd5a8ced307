"""Folders as their makers publish them: ScienceQA, IconQA, and pictures sorted into a folder for each class.

- ScienceQA (Lu et al. 2022, arXiv:2209.09513): ``problems.json`` with all questions by number, ``pid_splits.json``
  with the numbers of each split, pictures in ``<split>/<number>/image.png`` or ``images/<split>/...``. The layout on
  the Hugging Face Hub is a table, read as any other.
- IconQA (Lu et al. 2021, arXiv:2110.13214): ``problems.json`` and ``pid_splits.json`` beside
  ``iconqa/<split>/<task>/<number>/image.png``. Questions whose choices are pictures (``choose_img``) need several
  images at once, which the models here do not take: these rows are counted and reported, not asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fednano.data.kinds import choice_question
from fednano.data.rows import Row, Table
from fednano.errors import DataError

__all__ = ["image_folder", "is_image_folder", "is_problems", "problems"]

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


def is_problems(folder: Path) -> Path | None:
    """The folder of a ScienceQA or IconQA release at or right below ``folder``."""
    candidates = (folder, folder / "scienceqa", folder / "iconqa_data", folder / "data" / "scienceqa")
    return next((c for c in candidates if (c / "problems.json").is_file()), None)


def problems(folder: Path, name: str, split: str) -> Table:
    """The table of a ScienceQA or IconQA folder.

    Raises:
        DataError: its index is missing or damaged, or has no such split.
    """
    index = folder / "pid_splits.json"
    splits = _json(index)
    icon = (folder / "iconqa").is_dir() or any(str(key).startswith("choose_") for key in splits)
    numbers = splits.get(split)
    if not isinstance(numbers, list) or not numbers:
        raise DataError(f"{index} has no split {split!r}; it has {', '.join(splits)}.")
    file = folder / "problems.json"
    stamp = (str(file.resolve()), str(file.stat().st_mtime_ns), str(index.stat().st_mtime_ns))

    def rows() -> Iterator[Row]:
        known = _json(file)
        for place, number in enumerate(numbers, start=1):
            found = known.get(str(number))
            if not isinstance(found, dict):
                yield Row(place, problem=f"problem {number} is not in {file.name}", file=index)
                continue
            convert = _icon if icon else _science
            values = convert(folder, str(number), found, split)
            if isinstance(values, str):
                yield Row(place, problem=values, file=index)
            else:
                yield Row(place, {**found, **values, "id": f"{name}/{number}"}, file=index)

    return Table(name, split, index, rows, folder, {}, stamp, kind="vqa" if icon else "multiple-choice")


def _science(folder: Path, number: str, found: Mapping[str, Any], split: str) -> dict[str, Any] | str:
    if not found.get("image"):
        return {"image": None}
    own = str(found.get("split", split))
    for base in (folder, folder / "images"):
        if (base / own / number / str(found["image"])).is_file():
            return {"image": str((base / own / number / str(found["image"])).relative_to(folder))}
    return f"problem {number}: {own}/{number}/{found['image']} does not exist below {folder}"


def _icon(folder: Path, number: str, found: Mapping[str, Any], split: str) -> dict[str, Any] | str:
    task = str(found.get("ques_type", ""))
    if task == "choose_img":
        return f"problem {number}: its choices are pictures, and the model takes one image a question"
    own = str(found.get("split", split))
    image = folder / "iconqa" / own / task / number / "image.png"
    if not image.is_file():
        return f"problem {number}: {image.relative_to(folder)} does not exist below {folder}"
    values: dict[str, Any] = {"image": str(image.relative_to(folder))}
    if task == "choose_txt":
        choices, right = found.get("choices"), found.get("answer")
        fits = isinstance(choices, list) and isinstance(right, int) and 0 <= right < len(choices)
        if not fits:
            return f"problem {number}: its answer {right!r} is none of its choices"
        assert isinstance(choices, list)
        question = choice_question(str(found.get("question", "")), [str(each) for each in choices])
        return values | {"question": question, "answer": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[int(right or 0)]}
    return values | {"answer": str(found.get("answer", ""))}


def is_image_folder(folder: Path) -> bool:
    """Whether a folder holds a folder of pictures for each class, in splits or not."""
    return _classes(_split_folder(folder, "train")) != []


def image_folder(folder: Path, name: str, split: str) -> Table | None:
    """The table of a folder of pictures; None where it has no such split."""
    base = _split_folder(folder, split)
    classes = _classes(base)
    if not classes or (base == folder and split == "test"):
        return None

    def rows() -> Iterator[Row]:
        place = 0
        for label in classes:
            for path in sorted((base / label).rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    place += 1
                    if path.suffix.lower() in _PICTURES:
                        yield Row(place, {"image": str(path.relative_to(folder)), "label": label}, file=path)
                    else:
                        yield Row(place, problem="is no picture by its ending", file=path)

    return Table(name, split, base, rows, folder, {"label": tuple(classes)}, (str(base.resolve()),))


def _split_folder(folder: Path, split: str) -> Path:
    return next((folder / each for each in _SPLITS.get(split, (split,)) if (folder / each).is_dir()), folder)


def _classes(folder: Path) -> list[str]:
    """The folders right below that hold pictures."""
    found = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.is_dir() and any(path.suffix.lower() in _PICTURES for path in entry.iterdir()):
            found.append(entry.name)
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}. Take it from the data set's release.") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} holds {type(found).__name__}; expected an object by problem number.")
    return found
