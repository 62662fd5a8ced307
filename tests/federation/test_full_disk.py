"""A disk that fills up in the middle of a run, at the server or a site: said in words, and nothing done is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fednano.errors import RunError
from fednano.federation.apps import client_app
from fednano.federation.config import RunConfig
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.server import run_server
from fednano.federation.simulation import simulate
from fednano.federation.worker import Worker
from fednano.runs import RunFolder
from fednano.runs.plain import QuietView

ROUNDS = 4


class SmallDisk:
    """A file system of a few megabytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self) -> None:
        """Leave no byte free."""
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                pass

    def free(self) -> None:
        """Take the filler away."""
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, check=False).returncode:
        pytest.skip("needs root to mount a small file system")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class Watching(QuietView):
    """Fills a disk when a round starts, and frees it when another does."""

    def __init__(self, disk: SmallDisk, full: int, free: int = 0) -> None:
        super().__init__()
        self._disk, self._full, self._free = disk, full, free

    def round_started(self, number: int, clients: Sequence[str]) -> None:
        super().round_started(number, clients)
        if number == self._full:
            self._disk.fill()
        if number == self._free:
            self._disk.free()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Sixty questions without pictures, two clients, four short rounds."""
    data = tmp_path / "colours"
    data.mkdir()
    for split, count in (("train", 60), ("test", 6)):
        rows = [
            {"id": f"{split}-{n}", "question": f"what color is thing {n}?", "answer": ("red", "blue")[n % 2]}
            for n in range(count)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return RunConfig(
        dataset=str(data),
        clients=2,
        partition="iid",
        rounds=ROUNDS,
        samples=8,
        batch_size=8,
        rank=2,
        holdout=0.0,
        evaluate_every=0,
        placement="local",
        runs_dir=str(tmp_path / "runs"),
    )


def same(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (one, other))
    return set(ours) == set(theirs) and all(ours[name].equal(theirs[name]) for name in ours)


def test_the_servers_disk_fills_up_and_the_run_goes_on_when_there_is_space(
    config: RunConfig, disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = simulate(config, backend="inprocess", view=QuietView())
    full = config.changed(runs_dir=str(disk.path / "runs"), cache_dir=config.runs_dir)
    with pytest.raises(RunError, match=r"No space left on device.*Free space.*resume"):
        simulate(full, backend="inprocess", view=Watching(disk, 3))
    (run,) = [path for path in (disk.path / "runs").iterdir() if not path.is_symlink()]
    assert RunFolder(run).checkpoints()[-1] == 2
    assert "No space left" in capsys.readouterr().err
    with pytest.raises(RunError, match="No space left on device"):  # it is still full
        simulate(full.changed(resume=run.name), backend="inprocess", view=QuietView())
    disk.free()
    resumed = simulate(full.changed(resume=run.name), backend="inprocess", view=QuietView())
    assert resumed == run
    assert same(run, reference)
    rounds = [r["round"] for r in RunFolder(run).metrics() if r.get("scope") == "global" and r["round"]]
    assert set(rounds) == set(range(1, ROUNDS + 1))


def test_a_sites_disk_fills_up_and_it_comes_back_when_there_is_space(
    config: RunConfig, disk: SmallDisk
) -> None:
    """SCAFFOLD's control variates are what a site must remember; without them its update is not taken."""
    config = config.changed(rule="scaffold")
    grid = InProcessGrid(client_app, 2)
    grid._contexts[2].node_config["state"] = str(disk.path / "memory")
    try:
        run = run_server(grid, config, view=Watching(disk, 2, free=4))
    finally:
        grid.close()
        Worker.close_current()
    records = [r for r in RunFolder(run).metrics() if r.get("scope") == "client" and r["round"]]
    told = {(r["client"], r["round"]): str(r.get("refused", "")) for r in records}
    assert {key for key, reason in told.items() if not reason} == {
        *(("client-000", number) for number in range(1, ROUNDS + 1)),
        *(("client-001", number) for number in (1, 4)),
    }
    for number in (2, 3):
        assert "No space left on device" in told["client-001", number]
    assert (run / "summary.json").exists()
