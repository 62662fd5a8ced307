"""Data of one's own: VQA as JSON Lines. No row may vanish without a word."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fednano.data import load_dataset
from fednano.errors import DataError

GOOD = {"image": "a.png", "question": "what is it?", "answer": "a cat"}


def make(folder: Path, *lines: object) -> Path:
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("images/a.png", "images/sub/b.png", "beside.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_reads_rows(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"image": "sub/b.png", "question": "q", "answer": "x", "id": "mine"},
        {"image": "beside.png", "question": "Größe?", "answers": ["zwei", "drei", "drei"]},
        {"question": "text only", "answer": "yes"},
        {"image": None, "question": "text only", "answer": "no", "answers": ["no", "nope"]},
    ]
    folder = make(tmp_path / "mine", *rows)
    data = load_dataset(folder, "train")
    assert [s.id for s in data] == ["mine/train/00001", "mine", *(f"mine/train/0000{n}" for n in (3, 4, 5))]
    assert [s.answer for s in data] == ["a cat", "x", "drei", "yes", "no"]
    assert data[2].answers == ("zwei", "drei", "drei")
    assert [s.image.name if s.image else None for s in data] == ["a.png", "b.png", "beside.png", None, None]
    assert all(s.image is None or s.load_image() for s in data)
    assert data.bad_rows == ()


BAD = {
    "not json": ("{", "not JSON"),
    "too deep": ("[" * 100_000, "nested too deeply"),
    "no object": ([1], "expected an object"),
    "no question": ({"image": "a.png", "answer": "x"}, "question is missing"),
    "empty question": ({"question": " ", "answer": "x"}, "question must be a non-empty string"),
    "no answer": ({"question": "q"}, "answer is missing"),
    "number as answer": ({"question": "q", "answer": 3}, "answer must be a non-empty string, got 3"),
    "answers no list": ({"question": "q", "answers": "x"}, "answers must be a list"),
    "answers with a hole": ({"question": "q", "answers": ["x", ""]}, "answers must be a list"),
    "missing image": ({"image": "z.png", "question": "q", "answer": "x"}, "'z.png' does not exist"),
    "image outside": ({"image": "../../x.png", "question": "q", "answer": "x"}, "outside the data folder"),
    "absolute image": ({"image": "/etc/hostname", "question": "q", "answer": "x"}, "outside the data folder"),
    "zero byte": ({"image": "a\0.png", "question": "q", "answer": "x"}, "zero byte"),
    "bad id": ({"id": 4, "question": "q", "answer": "x"}, "id must be a non-empty string"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_reported_with_file_and_line(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line, reason = BAD[kind]
    folder = make(tmp_path / "mine", GOOD, "", line, GOOD)
    with caplog.at_level(logging.WARNING, logger="fednano.data"):
        data = load_dataset(folder)
    assert len(data) == 2
    [bad] = data.bad_rows
    assert (bad.file, bad.line) == (folder / "train.jsonl", 3)
    assert reason in bad.reason
    assert f"train.jsonl:3: {bad.reason}" in caplog.text
    assert "1 of 3 rows" in caplog.text
    with pytest.raises(DataError, match=r"train\.jsonl:3"):
        load_dataset(folder, strict=True)


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (2, 2)).save(secret)
    folder = make(tmp_path / "mine", {"image": "link.png", "question": "q", "answer": "x"}, GOOD)
    (folder / "images" / "link.png").symlink_to(secret)
    assert "outside the data folder" in load_dataset(folder).bad_rows[0].reason


def test_ids_must_be_unique(tmp_path: Path) -> None:
    folder = make(tmp_path / "mine", GOOD | {"id": "1"}, GOOD | {"id": "1"})
    assert "used before" in load_dataset(folder).bad_rows[0].reason


@settings(max_examples=30, deadline=None)
@given(kinds=st.lists(st.sampled_from(["good", "blank", *BAD]), min_size=1, max_size=12))
def test_every_row_is_either_read_or_reported(
    kinds: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make(
        tmp_path_factory.mktemp("d") / "mine",
        *({"good": GOOD, "blank": ""}.get(kind) or (BAD[kind][0] if kind in BAD else "") for kind in kinds),
    )
    expected_bad = [place for place, kind in enumerate(kinds, start=1) if kind in BAD]
    if "good" not in kinds:
        with pytest.raises(DataError):
            load_dataset(folder)
        return
    data = load_dataset(folder)
    assert [row.line for row in data.bad_rows] == expected_bad
    assert len(data) == kinds.count("good")


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a known name nor a folder or file here"):
        load_dataset("no-such-data")
    folder = make(tmp_path / "mine", GOOD)
    with pytest.raises(DataError, match=r"has no test\.jsonl \(it has: train\.jsonl\)"):
        load_dataset(folder, "test")
    with pytest.raises(DataError, match="has no"):
        load_dataset(folder, "../mine/train")
    with pytest.raises(DataError, match="nor a folder or file that exists"):
        load_dataset(tmp_path / "nowhere")


def test_empty_file_and_wrong_encoding(tmp_path: Path) -> None:
    folder = make(tmp_path / "mine")
    with pytest.raises(DataError, match="holds no rows"):
        load_dataset(folder)
    (folder / "train.jsonl").write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_dataset(folder)


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    folder = make(tmp_path / "mine", GOOD)
    source = folder / "train.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert len(load_dataset(folder)) == 1
