"""Jobs before they are worked on: who is let in, what the states allow, who must approve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from job_world import FakeRunner, World, committed, samples, submit, tensors

from fednano.errors import ConfigError, DataError, JobStateError, RequestRefused
from fednano.unlearning.jobs.registry import Policy
from fednano.unlearning.jobs.request import Plan
from fednano.unlearning.jobs.states import FINAL, MOVES, State
from fednano.unlearning.jobs.work import work


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


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
