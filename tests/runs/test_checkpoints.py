"""Checkpoints: whole or absent, damage noticed, the newest and the best kept."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednano.errors import RunError
from fednano.runs import RunFolder, checkpoints
from fednano.runs.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint


def tensors(number: int = 0, size: int = 4) -> dict[str, Tensor]:
    return {"site.A": torch.full((size, 2), float(number)), "site.B": torch.arange(size, dtype=torch.int64)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_round_trip_keeps_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.randint(0, 2, (5, 8), dtype=torch.uint8)
    content = {
        "x": bits.to(dtype),
        "turned": bits.to(dtype).T,
        "part": bits.to(dtype)[1:, ::2],
        "none": bits[:0],
    }
    state = {"rng": [1, 2, 3], "nested": {"loss": 0.1, "name": "ü"}, "empty": None}
    save_checkpoint(tmp_path, 3, content, state, score=0.5)
    loaded = load_checkpoint(tmp_path)
    assert (loaded.round, loaded.score, loaded.state) == (3, 0.5, state)
    assert same(loaded.tensors, {k: v.contiguous() for k, v in content.items()})


def test_parameters_that_need_gradients_and_shared_memory(tmp_path: Path) -> None:
    base = torch.nn.Parameter(torch.ones(4, 4))
    save_checkpoint(tmp_path, 0, {"a": base, "b": base[:2]}, {})
    loaded = load_checkpoint(tmp_path, 0)
    assert loaded.tensors["b"].shape == (2, 4)
    assert not loaded.tensors["a"].requires_grad


@settings(max_examples=25, deadline=None)
@given(
    scores=st.lists(st.one_of(st.none(), st.integers(0, 5)), min_size=1, max_size=7),
    keep=st.integers(1, 4),
)
def test_the_last_ones_and_the_best_are_kept(
    scores: list[int | None], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("c")
    for number, score in enumerate(scores):
        save_checkpoint(folder, number, tensors(number, 1), {}, score=score, keep_last=keep)
    kept = list_checkpoints(folder)
    assert kept[-keep:] == list(range(len(scores)))[-keep:]
    known = [score for score in scores if score is not None]
    assert len(kept) <= keep + (1 if known else 0)
    if known:
        assert any(scores[number] == max(known) for number in kept)
    assert sorted(p.name for p in folder.iterdir()) == [f"round-{n:04d}" for n in kept]


def test_a_round_is_replaced(tmp_path: Path) -> None:
    for value in (1, 2):
        save_checkpoint(tmp_path, 7, tensors(value), {"value": value})
    assert load_checkpoint(tmp_path).state == {"value": 2}
    assert same(load_checkpoint(tmp_path, 7).tensors, tensors(2))
    assert [p.name for p in tmp_path.iterdir()] == ["round-0007"]


def test_missing_rounds(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    save_checkpoint(tmp_path, 2, tensors(), {})
    with pytest.raises(RunError, match=r"no checkpoint of round 5 .* rounds \[2\]"):
        load_checkpoint(tmp_path, 5)


def damage_tensors(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def damage_state(folder: Path) -> None:
    path = folder / "state.json"
    body = json.loads(path.read_text())
    body["state"]["round"] = 99
    path.write_text(json.dumps(body))


def swap_tensors_and_hash(folder: Path) -> None:
    """Other tensors with their hash, but the state's own hash as it was."""
    other = save_checkpoint(folder.parent / "elsewhere", 0, tensors(5), {})
    shutil.copy(other / "adapter.safetensors", folder / "adapter.safetensors")
    body = json.loads((folder / "state.json").read_text())
    body["sha256"] = json.loads((other / "state.json").read_text())["sha256"]
    (folder / "state.json").write_text(json.dumps(body))


DAMAGE: dict[str, Any] = {
    "a bit of the tensors": damage_tensors,
    "tensors cut off": lambda f: (f / "adapter.safetensors").write_bytes(
        (f / "adapter.safetensors").read_bytes()[:9]
    ),
    "no tensors": lambda f: (f / "adapter.safetensors").unlink(),
    "state changed": damage_state,
    "state cut off": lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:40]),
    "no state": lambda f: (f / "state.json").unlink(),
    "state is a list": lambda f: (f / "state.json").write_text("[]"),
    "tensors swapped": swap_tensors_and_hash,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_other_rounds_are_named(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    for number in (1, 2):
        save_checkpoint(folder, number, tensors(number), {"round": number})
    DAMAGE[kind](folder / "round-0002")
    with pytest.raises(RunError, match=r"Resume from another round: \[1\]"):
        load_checkpoint(folder)
    assert load_checkpoint(folder, 1).state == {"round": 1}
    save_checkpoint(folder, 3, tensors(3), {})  # going on is possible
    assert load_checkpoint(folder).round == 3


def test_a_renamed_round_is_noticed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors(), {})
    (tmp_path / "round-0001").rename(tmp_path / "round-0009")
    with pytest.raises(RunError, match="renamed"):
        load_checkpoint(tmp_path)


def test_a_newer_format_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_FORMAT", 2)
    save_checkpoint(tmp_path, 1, tensors(), {})
    monkeypatch.undo()
    with pytest.raises(RunError, match="format 2; this version reads format 1"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("state", [{"x": {1}}, {"x": float("nan")}, {"x": torch.ones(1)}, {3: "x"}])
def test_a_state_that_is_no_json_is_refused_and_nothing_is_left(state: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors(), {})
    with pytest.raises(RunError, match="state of round 2 cannot be saved"):
        save_checkpoint(tmp_path, 2, tensors(), state)
    assert [p.name for p in tmp_path.iterdir()] == ["round-0001"]


@pytest.mark.parametrize(("number", "keep"), [(-1, 3), (1, 0)])
def test_arguments(number: int, keep: int, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="round >= 0 and keep_last >= 1"):
        save_checkpoint(tmp_path, number, tensors(), {}, keep_last=keep)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX thing")
def test_a_full_disk_leaves_the_earlier_rounds(tmp_path: Path) -> None:
    """The system itself refuses to write more than 8 kB a file, as it does when the disk is full."""
    save_checkpoint(tmp_path, 1, tensors(1), {"round": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        for number in (1, 2):  # also when the same round is saved again
            with pytest.raises(RunError, match=r"could not be saved: .*Free space.* round 1 is intact"):
                save_checkpoint(tmp_path, number, tensors(2, size=4096), {"round": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["round-0001"]
    assert same(load_checkpoint(tmp_path).tensors, tensors(1))


def test_a_process_that_died_in_between(tmp_path: Path) -> None:
    """Every state that the folder can be in between two steps of saving."""
    save_checkpoint(tmp_path, 1, tensors(1), {"round": 1})
    # died while writing round 2: only part of it is there, under its temporary name
    (tmp_path / ".new-round-0002-abcd").mkdir()
    (tmp_path / ".new-round-0002-abcd" / "adapter.safetensors").write_bytes(b"part")
    assert list_checkpoints(tmp_path) == [1]
    # died while replacing round 1, after the old one was moved aside
    (tmp_path / "round-0001").rename(tmp_path / ".old-round-0001")
    assert load_checkpoint(tmp_path).state == {"round": 1}
    # died after the new one was in place
    shutil.copytree(tmp_path / "round-0001", tmp_path / ".old-round-0001")
    # died while deleting an old round
    shutil.copytree(tmp_path / "round-0001", tmp_path / ".gone-round-0000-abcd")
    save_checkpoint(tmp_path, 2, tensors(2), {"round": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0001", "round-0002"]


def test_phases_have_folders_of_their_own(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "x")
    run.save_checkpoint(1, tensors(1), {"a": 1})
    run.save_checkpoint(4, tensors(4), {"a": 4}, phase="local-only")
    assert run.checkpoints() == [1]
    assert run.checkpoints(phase="local-only") == [4]
    assert run.load_checkpoint().state == {"a": 1}
    assert run.load_checkpoint(4, phase="local-only").state == {"a": 4}
    for name in ("../x", "", "A", "a/b"):
        with pytest.raises(RunError, match="cannot name a folder"):
            run.save_checkpoint(1, tensors(), {}, phase=name)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, tensors(), {"x": 1})
    assert sorted(p.name for p in path.iterdir()) == ["adapter.safetensors", "state.json"]
    header = int.from_bytes((path / "adapter.safetensors").read_bytes()[:8], "little")
    names = json.loads((path / "adapter.safetensors").read_bytes()[8 : 8 + header])
    assert set(names) == {"site.A", "site.B"}
