"""Run folders: names, pointer to the newest, single files, refused paths."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fednano.errors import RunError
from fednano.runs import RunFolder, atomic


def test_create_and_open(tmp_path: Path) -> None:
    when = datetime(2026, 1, 31, 16, 25, 1, tzinfo=timezone(timedelta(hours=2)))
    run = RunFolder.create(tmp_path / "runs", "Easy VQA / α", {"rounds": 3}, command=["a", "b c"], now=when)
    assert run.id == "20260131-142501-easy-vqa"
    assert run.config() == {"rounds": 3, "created": "2026-01-31T14:25:01Z", "command": "a 'b c'"}
    for name in (run.id, "latest", run.path, str(run.path)):
        assert RunFolder.open(name, root=tmp_path / "runs").path == run.path


def test_an_existing_run_is_never_written_over(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    runs = [RunFolder.create(tmp_path, "x", {"n": n}, now=now) for n in range(3)]
    assert len({run.path for run in runs}) == 3
    assert [run.config()["n"] for run in runs] == [0, 1, 2]
    assert RunFolder.open(root=tmp_path).path == runs[-1].path


@pytest.mark.parametrize("name", ["", "../..", "///", "α", "x" * 300, ".hidden", "con\0"])
def test_any_name_gives_one_harmless_folder(name: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs", name)
    assert run.path.parent == (tmp_path / "runs").resolve()
    assert re.fullmatch(r"\d{8}-\d{6}-[a-z0-9-]{1,40}", run.id)


def test_latest_moves_in_one_step(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, "first")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "latest").readlink() == Path(first.id)  # relative: the folder of all runs can be moved
    second = RunFolder.create(tmp_path, "second")
    assert RunFolder.open(root=tmp_path).id == second.id
    tmp_path.rename(tmp_path.with_name("moved"))
    assert RunFolder.open(root=tmp_path.with_name("moved")).id == second.id
    tmp_path.with_name("moved").rename(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.id, second.id, "latest"])


def test_latest_is_a_text_file_where_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    RunFolder.create(tmp_path, "first")
    run = RunFolder.create(tmp_path, "second")
    assert (tmp_path / "latest").read_text().strip() == run.id
    assert RunFolder.open(root=tmp_path).path == run.path
    assert RunFolder.open(tmp_path / "latest").path == run.path


def test_a_folder_called_latest_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(RunError, match="Rename the folder"):
        RunFolder.create(tmp_path, "x")


def test_open_names_the_runs_there_are(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="There are no runs there"):
        RunFolder.open(root=tmp_path)
    run = RunFolder.create(tmp_path, "mine")
    with pytest.raises(RunError, match=f"no run 'other'.*{run.id}"):
        RunFolder.open("other", root=tmp_path)


def test_create_where_it_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot make a run folder"):
        RunFolder.create(tmp_path / "file" / "runs")


def test_secrets_do_not_reach_the_disk(tmp_path: Path) -> None:
    config = {
        "host_token": "s3cret",
        "password": "s3cret",
        "API_KEY": "s3cret",
        "max_new_tokens": 4,
        "tokens": 5,
    }
    run = RunFolder.create(tmp_path, "x", config)
    assert "s3cret" not in (run.path / "config.json").read_text()
    assert run.config()["max_new_tokens"] == 4
    assert run.config()["tokens"] == 5


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/../../x.json", "", ".", "..", "link/x.json", "a\0b"]
)
def test_paths_that_lead_outside_are_refused(name: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs", "x")
    (run.path / "link").symlink_to(tmp_path)
    with pytest.raises(RunError, match="inside the run folder"):
        run.write_json(name, 1)
    with pytest.raises(RunError, match="inside the run folder"):
        run.read_json(name)
    with pytest.raises(RunError, match="inside the run folder"):
        run.file(name)
    assert not (tmp_path / "x.json").exists()


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    value = {
        "a": [1, 2.5, None, True, "ü\n\u2028"],
        "b": {"c": math.nan, "d": [math.inf, -math.inf]},
        "e": tmp_path,
    }
    run.write_json("deep/er/v.json", value)
    assert run.read_json("deep/er/v.json") == {
        "a": [1, 2.5, None, True, "ü\n\u2028"],
        "b": {"c": None, "d": [None, None]},
        "e": str(tmp_path),
    }
    json.loads((run.path / "deep/er/v.json").read_text(), parse_constant=pytest.fail)
    with pytest.raises(RunError, match=r"Cannot write .*v\.json"):
        run.write_json("deep/er/v.json", {"x": np.zeros(2)})
    assert run.read_json("deep/er/v.json")["e"] == str(tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        run.read_json("nothing.json")
    (run.path / "broken.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read as JSON"):
        run.read_json("broken.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path, "x")
    run.write_json("v.json", 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(
        RunError, match=r"No space left on device \(needed \d+ bytes, [\d,]+ are free\). Free space"
    ):
        run.write_json("v.json", 2)
    monkeypatch.undo()
    assert run.read_json("v.json") == 1
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "v.json"]


def test_adapter_round_trip_and_damage(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    with pytest.raises(RunError, match=r"adapter\.json does not exist"):
        run.load_adapter()
    tensors = {"a.A": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    run.save_adapter(tensors, {"name": "nano", "rank": 2})
    loaded, info = run.load_adapter()
    assert {k: (v.dtype, v.tolist()) for k, v in loaded.items()} == {
        k: (v.dtype, v.tolist()) for k, v in tensors.items()
    }
    assert (info["name"], info["rank"]) == ("nano", 2)
    path = run.path / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"damaged: its sha256.*newest checkpoint"):
        run.load_adapter()


def test_images(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    name = run.save_image("sample-1", Image.new("RGB", (3, 2), "red"))
    assert name == "images/sample-1.png"
    with Image.open(run.path / name) as image:
        assert image.size == (3, 2)
    with pytest.raises(RunError, match="inside the run folder"):
        run.save_image("../../x", Image.new("RGB", (1, 1)))
