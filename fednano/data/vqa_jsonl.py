"""VQA as JSON Lines beside an image folder: the layout for data of one's own.

::

    my-data/
      train.jsonl      {"image": "cat.png", "question": "what animal is this?", "answer": "cat"}
      test.jsonl
      images/cat.png

One object a line. ``image`` is a path below ``images/`` (or below the folder itself), or null or absent for a
text-only question. ``answers``, a list of strings, may stand beside or instead of ``answer``: the most
frequent one is then learnt, and all count in VQA accuracy. ``id`` is optional and must be unique.

A row that does not fit is left out, counted, and kept in ``Dataset.bad_rows`` with file, line and reason.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from fednano.data.sample import BadRow, Dataset, Sample
from fednano.errors import DataError

__all__ = ["load_vqa_jsonl"]

_log = logging.getLogger("fednano.data")
_SHOWN = 5


class _BadRowError(Exception):
    """What is wrong with the row at hand."""


def load_vqa_jsonl(folder: str | Path, split: str = "train", *, strict: bool = False) -> Dataset:
    """Load ``<folder>/<split>.jsonl`` with its images.

    Image files must exist; they are decoded later, when asked for.

    Args:
        folder: the folder that holds the JSON Lines files.
        split: name of the file without its ending, usually ``"train"`` or ``"test"``.
        strict: refuse the data set at the first bad row instead of leaving the row out.

    Returns:
        The good rows in file order. Ids are the rows' own, or ``"<folder name>/<split>/<line>"`` with the
        line number from 1.

    Raises:
        DataError: the folder or the file is missing or is not UTF-8, no row is good, or a row is bad and
            ``strict`` is set.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(
            f"Data folder {root} does not exist. Give a folder that holds train.jsonl, test.jsonl and "
            "images/."
        )
    source = root / f"{split}.jsonl"
    if split != Path(split).name or not source.is_file():
        found = sorted(path.name for path in root.glob("*.jsonl")) or ["no .jsonl file"]
        raise DataError(
            f"Data folder {root} has no {split}.jsonl (it has: {', '.join(found)}). Write one object a line: "
            '{"image": "cat.png", "question": "what animal is this?", "answer": "cat"}'
        )
    root = root.resolve()
    samples: list[Sample] = []
    bad: list[BadRow] = []
    ids: set[str] = set()
    try:
        with source.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue  # an empty line carries nothing that could be lost
                try:
                    sample = _read_row(line, root, f"{root.name}/{split}/{number:05d}")
                    if sample.id in ids:
                        raise _BadRowError(f"id {sample.id!r} was used before; ids must be unique")
                except _BadRowError as error:
                    bad.append(BadRow(source, number, str(error)))
                    continue
                ids.add(sample.id)
                samples.append(sample)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}. Check its permissions.") from error
    if bad:
        listed = "\n  ".join(str(row) for row in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        message = (
            f"{len(bad)} of {len(bad) + len(samples)} rows of {source} cannot be used:\n  {listed}{more}"
        )
        if strict or not samples:
            raise DataError(f"{message}\nCorrect or remove these rows.")
        _log.warning("%s", message)
    if not samples:
        raise DataError(f"{source} holds no rows. Write at least one question to it.")
    return Dataset(root.name, split, tuple(samples), tuple(bad))


def _read_row(line: str, root: Path, default_id: str) -> Sample:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise _BadRowError(f"not JSON: {error}") from error
    except RecursionError:
        raise _BadRowError("not JSON that can be read: nested too deeply") from None
    if not isinstance(row, dict):
        raise _BadRowError(f"expected an object with image, question and answer, got {type(row).__name__}")
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(text, str) and text.strip() for text in answers):
        raise _BadRowError(f"answers must be a list of non-empty strings, got {answers!r:.80}")
    answer = row.get("answer")
    if answer is None and answers:
        # most_common keeps the order of first appearance among equals, so that the choice does not depend on
        # hashing
        answer = Counter(answers).most_common(1)[0][0]
    identity = row.get("id", default_id)
    return Sample(
        id=_text(identity, "id"),
        image=_image(row.get("image"), root),
        question=_text(row.get("question"), "question"),
        answer=_text(answer, "answer"),
        answers=tuple(answers),
    )


def _text(value: object, key: str) -> str:
    if value is None:
        raise _BadRowError(f"{key} is missing")
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f"{key} must be a non-empty string, got {value!r:.80}")
    return value


def _image(value: object, root: Path) -> Path | None:
    if value is None:
        return None
    name = _text(value, "image")
    if "\0" in name:
        raise _BadRowError("image holds a zero byte")
    for base in (root / "images", root):
        path = (base / name).resolve()
        if not path.is_relative_to(root):
            raise _BadRowError(f"image {name!r} lies outside the data folder; put it below {root / 'images'}")
        if path.is_file():
            return path
    raise _BadRowError(f"image {name!r} does not exist below {root / 'images'} or {root}")
