"""`kill -9` between any two durable steps: the adapter is the old or the new one, and the next worker ends at the same
place."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from job_world import FakeRunner, World, tensors

from fednano.runs.tombstones import commit_pending, read_tombstones
from fednano.unlearning.jobs.request import request_key
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.views import check_job
from fednano.unlearning.jobs.work import work

SCRIPT = Path(__file__).parent / "killed_worker.py"
OLD, NEW = tensors(1.0), tensors(5.0)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and fork")


def killed_everywhere(world: World, folder: Path, action: str) -> list[World]:
    """Copies of a world, in each of which a worker was killed before another step."""

    def start(lines: list[str]) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT)],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        return [int(text) for text in done.stdout.split()]

    def copy(name: str) -> str:
        shutil.copytree(world.folder, folder / name)
        return str(folder / name)

    (total,) = start([f"{copy('whole')} 0 {action}"])
    assert total > 10
    names = [f"kill-{last}" for last in range(1, total + 1)]
    ends = start([f"{copy(name)} {last} {action}" for last, name in enumerate(names, start=1)])
    assert ends == [-signal.SIGKILL] * total
    return [World(folder / name, fresh=False) for name in names]


@pytest.fixture
def queued(tmp_path: Path) -> World:
    world = World(tmp_path / "world")
    world.desk.submit(world.request(), actor="test")
    assert world.server
    return world


def test_a_worker_killed_at_any_step(queued: World, tmp_path: Path) -> None:
    seen = set()
    for world in killed_everywhere(queued, tmp_path, "work"):
        found = world.adapter()  # readable, whole, and one of the two
        assert found in (OLD, NEW)
        state = world.desk.store.job("u0001").state
        seen.add(state)
        if found == NEW:
            assert commit_pending(world.run)
            assert state in (State.VERIFYING, State.COMMITTED)
        elif not world.desk.store.intents():
            assert read_tombstones(world.run).epoch == 0
        runner = FakeRunner()
        work(world.desk, runner, world.server)
        job = world.desk.store.job("u0001")
        assert job.state is State.COMMITTED
        assert world.adapter() == NEW
        assert len(runner.tasks) == (1 if state in (State.QUEUED, State.RUNNING) else 0)
        assert len(world.place.ledger.verify(world.server.public)) == 1
        assert read_tombstones(world.run).epoch == 1
        assert not commit_pending(world.run)
        assert all(row["holds"] for row in check_job(world.place, job, world.server.public))
        assert not list(world.run.glob("adapter-*"))
    assert seen == {State.QUEUED, State.RUNNING, State.VERIFYING, State.COMMITTED}


def test_a_rollback_killed_at_any_step(queued: World, tmp_path: Path) -> None:
    work(queued.desk, FakeRunner(), queued.server)
    ends = set()
    for world in killed_everywhere(queued, tmp_path, "rollback"):
        assert world.adapter() in (OLD, NEW)
        promised = bool(world.desk.store.intents())
        state = world.desk.store.job("u0001").state
        work(world.desk, FakeRunner(), world.server)
        back = promised or state is State.ROLLED_BACK
        assert world.desk.store.job("u0001").state is (State.ROLLED_BACK if back else State.COMMITTED)
        assert world.adapter() == (OLD if back else NEW)
        assert read_tombstones(world.run).epoch == (2 if back else 1)
        assert len(world.place.ledger.verify(world.server.public)) == (2 if back else 1)
        assert not commit_pending(world.run)
        ends.add(back)
    assert ends == {True, False}


def test_a_desk_killed_between_its_steps_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    envelope = world.request()
    job, _ = world.desk.store.add(request_key(envelope["request"]), envelope, actor="test")
    assert job.state is State.SUBMITTED  # as if the process had died right after filing it
    again, new = world.desk.submit(envelope, actor="test")
    assert (again.id, again.state, new) == (job.id, State.QUEUED, False)
