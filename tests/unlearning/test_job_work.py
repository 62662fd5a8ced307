"""Jobs at work: what is committed, what a full disk leaves, what can be undone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from job_world import FakeRunner, World, committed, samples, submit, tensors

from fednano.errors import ConfigError, DataError, Interrupted, JobStateError, RunError
from fednano.runs import RunFolder
from fednano.runs.tombstones import commit_pending, read_tombstones
from fednano.unlearning.jobs import exchange
from fednano.unlearning.jobs.commit import roll_back
from fednano.unlearning.jobs.purge import inventory, purge
from fednano.unlearning.jobs.receipt import NOT_AVAILABLE, verify_receipt
from fednano.unlearning.jobs.request import Plan
from fednano.unlearning.jobs.runner import Task
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.views import check_job, details
from fednano.unlearning.jobs.work import work


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class TestWork:
    def test_a_committed_job_has_adapter_tombstones_receipt_and_log(self, world: World) -> None:
        job = committed(world, deadline="2099-01-01")
        assert world.adapter() == tensors(5.0)
        assert (world.run / "adapter.safetensors").read_bytes() == tensors(5.0)
        body = verify_receipt(
            world.place.receipt(job.id).read_bytes(), world.server.public, log=world.place.root / "log.jsonl"
        )
        assert body["adapter"]["after"] == world.place.adapter()[0] != body["adapter"]["before"]
        assert body["metrics"]["before"] == {"auc": NOT_AVAILABLE, "loss": 0.25, "rouge": NOT_AVAILABLE}
        assert body["metrics"]["reference"] == body["reference"] == NOT_AVAILABLE
        assert body["deadline_met"] is True
        assert body["scope"]["first_round"] == 1
        forgotten = read_tombstones(world.run)
        assert forgotten.epoch == 1
        kept = forgotten.keep(samples("client-000"))
        assert [s.id for s in samples("client-000") if s not in kept] == world.ids()
        assert all(row["holds"] for row in check_job(world.place, job, world.server.public))
        for secret in world.ids():
            for path in world.place.root.rglob("*"):
                assert not path.is_file() or secret.encode() not in path.read_bytes(), path

    def test_the_runner_gets_what_was_trained_on_and_its_rounds_are_kept(self, world: World) -> None:
        runner = FakeRunner()
        job = submit(world, ids=[s.id for s in samples("client-000")[30:34]])
        work(world.desk, runner, world.server)
        assert runner.tasks[0].samples == tuple(s.id for s in samples("client-000")[30:32])
        shown = details(world.desk, world.desk.store.job(job.id))
        assert [row["ihl"] for row in shown["rounds"]] == [1.0, 0.5]
        assert read_tombstones(world.run).sets[0].hashes == frozenset(job.request["ids"])  # all four

    def test_compatible_jobs_are_worked_on_together(self, world: World) -> None:
        a, b = submit(world, ids=world.ids(count=2)), submit(world, ids=world.ids(count=2, start=2))
        other = submit(world, ids=world.ids(count=2, start=4), plan=Plan(rank=8))
        far = submit(world, site="client-001")
        runner = FakeRunner()
        done = work(world.desk, runner, world.server)
        assert [len(task.samples) for task in runner.tasks] == [4, 2, 3]
        assert {job.state for job in done} == {State.COMMITTED}
        assert [world.desk.store.job(j.id).batch for j in (a, b, other, far)] == [
            a.id,
            a.id,
            other.id,
            far.id,
        ]
        bodies = [json.loads(world.place.receipt(j.id).read_bytes())["receipt"] for j in (a, b)]
        assert [body["worked_on_together_with"] for body in bodies] == [[b.id], [a.id]]
        assert len(world.place.ledger.verify(world.server.public)) == 4
        assert read_tombstones(world.run).epoch == 3

    def test_what_is_not_accepted_leaves_everything_as_it_was(self, world: World) -> None:
        job = submit(world)
        work(world.desk, FakeRunner({"accepted": False, "reasons": ("utility fell to 0.5",)}), world.server)
        job = world.desk.store.job(job.id)
        assert (job.state, job.note) == (State.REJECTED, "utility fell to 0.5")
        assert world.adapter() == tensors(1.0)
        assert read_tombstones(world.run).epoch == 0
        assert not world.place.staging(job.id).exists()

    @pytest.mark.parametrize(
        ("error", "state"), [(DataError("bad"), State.FAILED), (RunError("disk full"), State.QUEUED)]
    )
    def test_errors_of_the_runner(self, world: World, error: Exception, state: State) -> None:
        def fail(task: Task) -> None:
            raise error

        job = submit(world)
        if state is State.QUEUED:
            with pytest.raises(RunError):
                work(world.desk, FakeRunner(during=fail), world.server)
        else:
            work(world.desk, FakeRunner(during=fail), world.server)
        job = world.desk.store.job(job.id)
        assert (job.state, job.note) == (state, str(error))
        assert world.adapter() == tensors(1.0)

    @pytest.mark.parametrize("error", [Interrupted("ctrl-c"), KeyboardInterrupt(), ZeroDivisionError("bug")])
    def test_an_interrupt_queues_again_and_a_defect_fails(self, world: World, error: BaseException) -> None:
        def fail(task: Task) -> None:
            raise error

        job = submit(world)
        with pytest.raises(type(error)):
            work(world.desk, FakeRunner(during=fail), world.server)
        expected = State.FAILED if isinstance(error, ZeroDivisionError) else State.QUEUED
        assert world.desk.store.job(job.id).state is expected

    def test_an_adapter_of_another_shape_needs_an_explanation(self, world: World) -> None:
        odd = tensors(3.0).replace(b"image.A", b"image.Z")
        job = submit(world)
        work(world.desk, FakeRunner({"payload": odd}), world.server)
        assert world.desk.store.job(job.id).state is State.FAILED
        job = submit(world, reason="again")
        work(world.desk, FakeRunner({"payload": odd, "info": {"rank": 8}}), world.server)
        assert world.desk.store.job(job.id).state is State.COMMITTED
        assert RunFolder(world.run).read_json("adapter.json")["rank"] == 8

    def test_an_owner_that_is_offline_makes_the_job_wait_and_others_go_on(self, world: World) -> None:
        late, other = submit(world, deadline="2099-01-01"), submit(world, site="client-001")
        world.holdings.absent = {"client-000"}
        work(world.desk, FakeRunner(), world.server)
        late = world.desk.store.job(late.id)
        assert late.state is State.QUEUED
        assert "not on this machine" in late.note
        assert world.desk.store.job(other.id).state is State.COMMITTED
        from fednano.unlearning.jobs.job import parse_time

        assert not late.overdue()
        assert late.overdue(parse_time("2099-01-03"))
        world.holdings.absent = set()
        work(world.desk, FakeRunner(), world.server)
        assert world.desk.store.job(late.id).state is State.COMMITTED

    def test_cancelling_while_it_runs_stops_at_a_safe_point(self, world: World) -> None:
        one, two = submit(world), submit(world, ids=world.ids(start=5, count=1))
        asked: list[bool] = []

        def cancel(task: Task) -> None:
            if not asked:
                asked.append(True)
                world.desk.cancel(one.id, actor="operator:x", reason="never mind")

        runner = FakeRunner(during=cancel)
        work(world.desk, runner, world.server)
        assert world.desk.store.job(one.id).state is State.CANCELLED
        assert world.desk.store.history(one.id)[-1].actor == "operator:x"
        assert world.desk.store.job(two.id).state is State.COMMITTED  # without the other's samples
        assert [len(task.samples) for task in runner.tasks] == [4, 1]

    def test_an_adapter_that_was_trained_on_meanwhile_is_not_written_over(self, world: World) -> None:
        trained: list[bool] = []

        def train(task: Task) -> None:
            if not trained:
                trained.append(True)
                world.write_adapter(7.0)

        job = submit(world)
        runner = FakeRunner(during=train)
        work(world.desk, runner, world.server)
        assert len(runner.tasks) == 2  # the first outcome was for another adapter
        assert [m.target for m in world.desk.store.history(job.id)][-4:] == [
            "queued",
            "running",
            "verifying",
            "committed",
        ]

    def test_one_worker_at_a_time(self, world: World) -> None:
        def second(task: Task) -> None:
            with pytest.raises(JobStateError, match="another process is working"):
                work(world.desk, FakeRunner(), world.server)

        submit(world)
        work(world.desk, FakeRunner(during=second), world.server)


class TestDiskFull:
    def test_before_the_promise_nothing_changes_and_the_next_worker_goes_on(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise RunError("No space left on device")

        job = submit(world)
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "write_bytes", full)
            with pytest.raises(RunError, match="No space"):
                work(world.desk, FakeRunner(), world.server)
        assert world.adapter() == tensors(1.0)
        assert world.desk.store.job(job.id).state is State.QUEUED
        work(world.desk, FakeRunner(), world.server)
        assert world.desk.store.job(job.id).state is State.COMMITTED

    @pytest.mark.parametrize("step", range(4))
    def test_after_the_promise_the_next_worker_finishes_without_unlearning_again(
        self, world: World, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        real, count = exchange.write_bytes, [0]

        def full(path: Path, content: bytes) -> None:
            if not world.desk.store.intents():
                return real(path, content)
            count[0] += 1
            if count[0] > step:
                raise RunError("No space left on device")
            return real(path, content)

        job = submit(world)
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "write_bytes", full)
            if step < 3:
                with pytest.raises(RunError, match="No space"):
                    work(world.desk, FakeRunner(), world.server)
                assert world.adapter() in (tensors(1.0), tensors(5.0))  # one or the other, and whole
                assert commit_pending(world.run)
            else:
                work(world.desk, FakeRunner(), world.server)
        runner = FakeRunner()
        work(world.desk, runner, world.server)
        assert runner.tasks == []
        assert world.desk.store.job(job.id).state is State.COMMITTED
        assert not commit_pending(world.run)
        assert all(
            row["holds"]
            for row in check_job(world.place, job=world.desk.store.job(job.id), public=world.server.public)
        )


class TestUndoing:
    def test_rollback_restores_adapter_and_samples(self, world: World) -> None:
        job = committed(world)
        purge(world.place, job.id, "quarantine", world.server, actor="test")
        assert not (world.run / "checkpoints/round-0002").exists()
        (back,) = roll_back(world.desk, job.id, world.server, actor="test", reason="utility")
        assert back.state is State.ROLLED_BACK
        assert world.adapter() == tensors(1.0)
        forgotten = read_tombstones(world.run)
        assert (forgotten.epoch, forgotten.sets) == (2, ())
        assert (world.run / "checkpoints/round-0002/adapter.safetensors").exists()
        kinds = [entry["kind"] for entry in world.place.ledger.verify(world.server.public)]
        assert kinds == ["receipt", "purge", "rollback"]
        assert world.place.receipt(job.id).exists()  # what was signed stays on record
        with pytest.raises(JobStateError, match="is rolled-back"):
            roll_back(world.desk, job.id, world.server, actor="test", reason="")
        assert submit(world).state is State.QUEUED  # it may be asked for again

    def test_only_the_newest_change_can_be_rolled_back(self, world: World) -> None:
        one = committed(world)
        two = committed(world, ids=world.ids(start=5, count=2))
        with pytest.raises(JobStateError, match="has changed since"):
            roll_back(world.desk, one.id, world.server, actor="test", reason="")
        roll_back(world.desk, two.id, world.server, actor="test", reason="")
        roll_back(world.desk, one.id, world.server, actor="test", reason="")
        assert world.adapter() == tensors(1.0)

    def test_purging_by_deletion_is_final(self, world: World) -> None:
        job = committed(world)
        before = {item.what: item for item in inventory(world.place, job.id)}
        assert {name for name, item in before.items() if item.kind == "checkpoint"} == {
            f"checkpoints/round-000{n}" for n in (1, 2, 3)
        }
        assert before["client-001"].status == "not reached"
        purge(world.place, job.id, "delete", world.server, actor="test")
        after = inventory(world.place, job.id)
        assert {item.status for item in after if item.kind in ("checkpoint", "escrow")} == {"deleted"}
        assert not list(world.run.rglob("round-*"))
        assert tensors(1.0) not in [p.read_bytes() for p in world.run.rglob("*.safetensors")]
        assert world.adapter() == tensors(5.0)
        with pytest.raises(JobStateError, match="is purged"):
            roll_back(world.desk, job.id, world.server, actor="test", reason="")

    def test_purging_an_earlier_job_leaves_a_later_one_its_way_back(self, world: World) -> None:
        one, two = committed(world), committed(world, ids=world.ids(start=5, count=2))
        purge(world.place, one.id, "delete", world.server, actor="test")
        roll_back(world.desk, two.id, world.server, actor="test", reason="")
        assert world.adapter() == tensors(5.0)  # as the first job left it
        with pytest.raises(JobStateError, match="is purged"):
            roll_back(world.desk, one.id, world.server, actor="test", reason="")

    def test_purging_a_later_job_takes_the_earlier_ones_way_back(self, world: World) -> None:
        one, two = committed(world), committed(world, ids=world.ids(start=5, count=2))
        purge(world.place, two.id, "delete", world.server, actor="test")
        left = [p.relative_to(world.place.root) for p in (world.place.root / "jobs").rglob("*.safetensors")]
        assert [str(path) for path in left] == [f"jobs/{two.id}/after.safetensors"]
        with pytest.raises(JobStateError, match=r"has changed since|is purged"):
            roll_back(world.desk, one.id, world.server, actor="test", reason="")

    def test_checkpoints_before_first_exposure_and_after_the_commit_are_clean(self, world: World) -> None:
        job = committed(world, ids=world.ids(start=16, count=2))  # drawn from round 2 on
        folder = RunFolder(world.run)
        folder.write_json("checkpoints/round-0004/state.json", {"round": 4, "state": {"tombstones": 1}})
        listed = [item.what for item in inventory(world.place, job.id) if item.kind == "checkpoint"]
        assert listed == ["checkpoints/round-0002", "checkpoints/round-0003"]

    def test_exports_caches_and_descendants_are_found(self, world: World) -> None:
        (world.run / "export").mkdir()
        (world.run / "export/model.gguf").write_bytes(b"x")
        (world.run / "export/same.safetensors").write_bytes(tensors(5.0))
        (world.run / "cache").mkdir()
        other = RunFolder(world.run.parent / "child")
        other.path.mkdir()
        other.write_json("config.json", {"start-from": "toy"})
        job = committed(world)
        found = {item.what: item.kind for item in inventory(world.place, job.id)}
        assert found["export/model.gguf"] == "export"
        assert "export/same.safetensors" not in found  # it is the committed adapter itself
        assert found["cache"] == "cache"
        assert found["child"] == "run"

    def test_what_cannot_be_removed_is_reported(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        import shutil

        def locked(path: Path, ignore_errors: bool = False) -> None:
            if not ignore_errors:
                raise PermissionError(13, "Permission denied")

        job = committed(world)
        monkeypatch.setattr(shutil, "rmtree", locked)
        done = {item.what: item for item in purge(world.place, job.id, "delete", world.server, actor="test")}
        assert done["checkpoints/round-0001"].status == "not reached"
        assert done["checkpoints/round-0001"].why == "Permission denied"

    def test_only_committed_jobs_are_purged(self, world: World) -> None:
        job = submit(world)
        with pytest.raises(JobStateError, match="once it is committed"):
            inventory(world.place, job.id)
        with pytest.raises(ConfigError, match="expected 'quarantine' or 'delete'"):
            purge(world.place, job.id, "burn", world.server, actor="test")
