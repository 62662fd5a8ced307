"""easy-VQA against the package's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import easy_vqa
import pytest

from fednano.data import load_dataset, load_easy_vqa
from fednano.errors import DataError


@pytest.mark.parametrize(("split", "rows"), [("train", 38_575), ("test", 9_673)])
def test_agrees_with_the_package(split: str, rows: int) -> None:
    data = load_easy_vqa(split)
    questions, answers, images = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    assert len(data) == rows == len(questions)
    assert [sample.question for sample in data] == questions
    assert list(data.labels) == answers
    assert [str(sample.image) for sample in data] == [paths[image] for image in images]
    assert list(data.label_names) == sorted(easy_vqa.get_answers())
    assert len({sample.id for sample in data}) == rows


def test_ids_are_stable_and_images_decode() -> None:
    data = load_dataset("easy-vqa", "train")
    assert data[12].id == "easy-vqa/train/00012"
    assert data[-1].id == "easy-vqa/train/38574"
    image = data[12].load_image()
    assert image is not None
    assert (image.mode, image.size) == ("RGB", (64, 64))


def test_unknown_split() -> None:
    with pytest.raises(DataError, match=r"no split 'val'.*'train' and 'test'"):
        load_easy_vqa("val")


@pytest.mark.parametrize("rows", [[["q", "a", 7]], [["q", "a"]], [["q", 3, 0]], "no list of rows"])
def test_damaged_package(rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "data" / "train" / "images"
    images.mkdir(parents=True)
    (images / "0.png").write_bytes(b"")
    text = rows if isinstance(rows, str) else json.dumps(rows)
    (tmp_path / "data" / "train" / "questions.json").write_text(text)
    monkeypatch.setitem(
        __import__("sys").modules, "easy_vqa", SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    )
    with pytest.raises(DataError, match=r"package easy-vqa is damaged.*Reinstall it"):
        load_easy_vqa("train")


def test_package_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(DataError, match=r"pip install easy-vqa==1\.0"):
        load_easy_vqa("train")
