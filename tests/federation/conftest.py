"""A small real data set (a slice of easy-VQA as a folder) and runs over it, shared by the federation tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fednano.data import load_easy_vqa
from fednano.federation.config import RunConfig
from fednano.federation.simulation import simulate
from fednano.runs import make_view


@pytest.fixture(scope="session")
def small_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-vqa")
    (folder / "images").mkdir()
    for split, count in (("train", 160), ("test", 24)):
        rows = []
        for sample in list(load_easy_vqa(split))[:count]:
            assert sample.image is not None
            name = f"{split}-{sample.image.name}"
            shutil.copyfile(sample.image, folder / "images" / name)
            rows.append({"image": name, "question": sample.question, "answer": sample.answer})
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def features_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def settings(small_vqa: Path, features_dir: Path, runs_dir: Path) -> dict[str, Any]:
    """A run of seconds: whole path, little data."""
    return {
        "dataset": str(small_vqa),
        "clients": 3,
        "alpha": 5.0,
        "rounds": 2,
        "samples": 24,
        "batch_size": 8,
        "rank": 4,
        "fisher_samples": 8,
        "holdout": 0.1,
        "evaluate_every": 0,
        "placement": "local",
        "runs_dir": str(runs_dir),
        "cache_dir": str(features_dir),
    }


Run = Callable[..., Path]


@pytest.fixture
def run(settings: dict[str, Any]) -> Run:
    def start(**changes: Any) -> Path:
        return simulate(RunConfig(**(settings | changes)), backend="inprocess", view=make_view("quiet"))

    return start
