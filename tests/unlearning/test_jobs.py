"""Jobs from request to receipt: who is let in, what the states allow, what is committed, what can be undone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from job_world import FakeRunner, World, samples, tensors

from fednano.errors import ConfigError, DataError, Interrupted, JobStateError, RequestRefused, RunError
from fednano.runs import RunFolder
from fednano.runs.tombstones import commit_pending, read_tombstones
from fednano.unlearning.jobs import exchange
from fednano.unlearning.jobs.commit import roll_back
from fednano.unlearning.jobs.job import Job
from fednano.unlearning.jobs.purge import inventory, purge
from fednano.unlearning.jobs.receipt import NOT_AVAILABLE, verify_receipt
from fednano.unlearning.jobs.registry import Policy
from fednano.unlearning.jobs.request import Plan
from fednano.unlearning.jobs.runner import Task
from fednano.unlearning.jobs.states import FINAL, MOVES, State
from fednano.unlearning.jobs.views import check_job, details
from fednano.unlearning.jobs.work import work


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def submit(world: World, **request: Any) -> Job:
    return world.desk.submit(world.request(**request), actor="test")[0]


def committed(world: World, **request: Any) -> Job:
    job = submit(world, **request)
    assert job.state is State.QUEUED, job.note
    work(world.desk, FakeRunner(), world.server)
    job = world.desk.store.job(job.id)
    assert job.state is State.COMMITTED, job.note
    return job


class TestStates:
    def test_every_move_that_is_not_allowed_is_refused_and_changes_nothing(self, world: World) -> None:
        job = submit(world)
        store = world.desk.store
        for state in State:
            with store.transaction() as database:
                database.execute("UPDATE jobs SET state = ? WHERE id = ?", (state.value, job.id))
            for target in State:
                if target not in MOVES[state]:
                    before = store.history(job.id)
                    with pytest.raises(
                        JobStateError, match=f"is {state.value} and cannot become {target.value}"
                    ):
                        store.move([job.id], target, actor="test")
                    assert store.job(job.id).state is state
                    assert store.history(job.id) == before

    def test_an_end_is_an_end(self) -> None:
        assert {state for state in State if not MOVES[state]} == FINAL - {State.COMMITTED}
        assert MOVES[State.COMMITTED] == {State.ROLLED_BACK}

    def test_jobs_move_together_or_not_at_all(self, world: World) -> None:
        one, two = submit(world), submit(world, ids=world.ids(start=5))
        world.desk.cancel(two.id, actor="test")
        with pytest.raises(JobStateError):
            world.desk.store.move([one.id, two.id], State.RUNNING, actor="test")
        assert world.desk.store.job(one.id).state is State.QUEUED

    def test_the_way_is_written_down_with_time_and_actor(self, world: World) -> None:
        job = committed(world)
        moves = world.desk.store.history(job.id)
        way = ["submitted", "validated", "approved", "queued", "running", "verifying", "committed"]
        assert [move.target for move in moves] == way
        assert [move.source for move in moves] == ["", *way[:-1]]
        assert moves[0].actor == "test"
        assert [move.time for move in moves] == sorted(move.time for move in moves)

    def test_an_unknown_job_is_named_with_those_there_are(self, world: World) -> None:
        submit(world)
        with pytest.raises(JobStateError, match=r"no job 'u0009'. The newest: u0001"):
            world.desk.store.job("u0009")


class TestSubmission:
    def test_the_same_request_twice_is_one_job(self, world: World) -> None:
        one, new = world.desk.submit(world.request(), actor="test")
        two, again = world.desk.submit(world.request(), actor="test")
        assert (one.id, new, again) == (two.id, True, False)
        committed(world)
        assert not world.desk.submit(world.request(), actor="test")[1]
        assert len(world.desk.store.jobs()) == 1

    def test_another_plan_is_another_job(self, world: World) -> None:
        assert submit(world).id != submit(world, plan=Plan(rank=8)).id

    def test_a_replayed_request_is_refused_once_its_job_has_ended(self, world: World) -> None:
        envelope = world.request()
        job, _ = world.desk.submit(envelope, actor="test")
        assert world.desk.submit(envelope, actor="test") == (world.desk.store.job(job.id), False)  # a retry
        world.desk.cancel(job.id, actor="test")
        with pytest.raises(RequestRefused, match="replayed"):
            world.desk.submit(envelope, actor="test")
        assert len(world.desk.store.jobs()) == 1
        assert "replayed" in world.desk.store.refusals()[-1]["reason"]

    def test_forged_requests_make_no_job_and_are_written_down(self, world: World) -> None:
        envelope = world.request()
        forged = [
            {**envelope, "signature": ""},
            {**envelope, "signature": "0" * 128},
            {**envelope, "public_key": world.keys["client-001"].public},
            {**envelope, "request": {**envelope["request"], "site": "client-001"}},
            {**envelope, "request": {**envelope["request"], "nonce": "0" * 32}},
            "junk",
        ]
        for each in forged:
            with pytest.raises(RequestRefused):
                world.desk.submit(each, actor="test")
        assert world.desk.store.jobs() == []
        assert len(world.desk.store.refusals()) == len(forged)

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            ({"ids": ["toy/client-001/subject-0/000"]}, "are not client-000's"),
            ({"ids": ["nowhere/1"]}, "are not client-000's"),
            ({"ids": [s.id for s in samples("client-000")[36:]]}, "ever trained on"),
            ({"ids": [s.id for s in samples("client-000")[32:34]]}, "ever trained on"),
            ({"ids": [s.id for s in samples("client-000")[:36]]}, "all training samples"),
            ({"ids": [s.id for s in samples("client-000")[:10]]}, "over quota"),
        ],
    )
    def test_scopes_that_are_rejected(self, world: World, request_: dict[str, Any], message: str) -> None:
        job = submit(world, **request_)
        assert job.state is State.REJECTED
        assert message in job.note
        assert work(world.desk, FakeRunner(), world.server) == []
        assert world.adapter() == tensors(1.0)

    def test_a_class_must_be_one(self, world: World) -> None:
        holding = world.holdings.holding("client-000")
        assert holding is not None
        red = [sample.id for sample in holding.samples if sample.answer == "red"]
        honest = submit(world, kind="class", name="red")
        assert honest.state is State.VALIDATED
        from fednano.unlearning.jobs.request import sign_request

        mixed = [*red[:3], next(s.id for s in holding.samples if s.answer == "blue")]
        lie = sign_request(
            world.keys["client-000"], run="toy", kind="class", name="red", ids=mixed, plan=Plan(), reason="x"
        )
        job, _ = world.desk.submit(lie, actor="test")
        assert job.state is State.REJECTED
        assert "not all of the class" in job.note

    def test_subjects_are_parts_of_ids(self, world: World) -> None:
        world.place.registry.save()
        job = submit(world, kind="subject", name="subject-3", ids=None)
        assert job.state is State.REJECTED  # ten samples are more than a quarter
        assert "over quota: with this request client-000 would have named 10 of 36" in job.note

    def test_quotas_count_what_was_accepted(self, world: World) -> None:
        registry = world.place.registry
        from dataclasses import replace

        replace(registry, policy=Policy(requests_a_day=2, share=1.0)).save()
        first = [submit(world, ids=world.ids(count=1, start=n)) for n in range(3)]
        assert [job.state for job in first] == [State.QUEUED, State.QUEUED, State.REJECTED]
        assert "2 requests within 24 hours" in first[-1].note
        assert submit(world, site="client-001").state is State.QUEUED  # another site has its own quota

    def test_many_small_requests_reach_the_quota_too(self, world: World) -> None:
        states = [submit(world, ids=world.ids(count=3, start=3 * n)).state for n in range(4)]
        assert states == [State.QUEUED] * 3 + [State.REJECTED]

    def test_no_retain_data(self, world: World) -> None:
        world.holdings.counts = {"client-000": 36}
        job = submit(world, kind="client")
        assert job.state is State.REJECTED
        assert "no retain data" in job.note

    def test_another_base_model(self, world: World) -> None:
        world.holdings.problem = "the run was made on another base model"
        assert "another base model" in submit(world).note

    def test_data_that_cannot_be_read_rejects_with_the_reason(self, world: World) -> None:
        def broken() -> Any:
            raise DataError("the disk with the data is away")

        world.desk._make_holdings = broken
        assert submit(world).note == "the disk with the data is away"

    def test_choosing_names_what_is_wrong(self, world: World) -> None:
        from fednano.unlearning.jobs.holdings import choose

        holding = world.holdings.holding("client-000")
        assert holding is not None
        with pytest.raises(ConfigError, match="no sample ids"):
            choose(holding, "samples", "")
        with pytest.raises(ConfigError, match=r"1 of 2 ids are not this site's, the first is 'x'"):
            choose(holding, "samples", "", [world.ids()[0], "x"])
        with pytest.raises(ConfigError, match="Its classes: blue, red"):
            choose(holding, "class", "green")


class TestApprovals:
    def test_a_whole_client_needs_two_different_approvers(self, world: World) -> None:
        job = submit(world, kind="client")
        assert job.state is State.VALIDATED
        assert world.desk.approve(job.id, world.keys["ann"]).state is State.VALIDATED
        with pytest.raises(RequestRefused, match="another approver"):
            world.desk.approve(job.id, world.keys["ann"])
        assert world.desk.approve(job.id, world.keys["ben"]).state is State.QUEUED
        with pytest.raises(JobStateError, match="only a validated job"):
            world.desk.approve(job.id, world.keys["ben"])

    def test_the_owner_and_strangers_cannot_approve(self, world: World, tmp_path: Path) -> None:
        from fednano.security.keys import create_key

        job = submit(world, kind="client")
        for key in (world.keys["client-000"], create_key(tmp_path / "x", "ann")):
            with pytest.raises(RequestRefused, match="no registered approver"):
                world.desk.approve(job.id, key)
        assert world.desk.store.job(job.id).state is State.VALIDATED

    def test_an_approval_is_worth_nothing_for_another_job_or_after_its_key_is_dropped(
        self, world: World
    ) -> None:
        from dataclasses import replace

        one, two = submit(world, kind="client"), submit(world, site="client-001", kind="client")
        world.desk.approve(one.id, world.keys["ann"])
        given = world.desk.store.approvals(one.id)[0]
        world.desk.store.add_approval(two.id, given["public"], given["name"], given["signature"])
        assert world.desk.valid_approvals(two) == []
        replace(world.place.registry, approvers={"ben": world.keys["ben"].public}).save()
        assert world.desk.approve(one.id, world.keys["ben"]).state is State.VALIDATED

    def test_declining_ends_it(self, world: World) -> None:
        job = submit(world, kind="client")
        job = world.desk.decline(job.id, world.keys["ben"], "too much")
        assert (job.state, job.note) == (State.REJECTED, "declined by ben: too much")


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
