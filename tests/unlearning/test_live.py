"""A job through connected clients: the bits of the job on the finished run, and what each site learns of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_end_to_end import ask, finished  # noqa: F401 - a fixture

from fednano.errors import ConfigError, RunError
from fednano.federation.apps import client_app
from fednano.federation.deployment import Deployment, open_deployment
from fednano.federation.exchange import Stop
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.messages import Instruction
from fednano.federation.server import config_of
from fednano.federation.worker import Worker
from fednano.runs import make_view
from fednano.runs.tombstones import Tombstones, read_tombstones
from fednano.security.canonical import canonical, sha256_hex
from fednano.security.keys import create_key, valid_signature
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.holdings import RunHoldings
from fednano.unlearning.jobs.loku import LokuRunner
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.receipt import verify_receipt
from fednano.unlearning.jobs.request import Plan
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.work import work
from fednano.unlearning.live import ENDED, ENDED_EARLY
from fednano.unlearning.live.ask import NAME, Ask, Forget
from fednano.unlearning.live.parties import LiveParties
from fednano.unlearning.live.runner import _refuse_early, serve, serve_queue
from fednano.unlearning.live.site import STATEMENT
from fednano.unlearning.methods import get_method
from fednano.unlearning.outcome import UnlearnRequest


@pytest.fixture
def live(finished: Path, tmp_path: Path) -> Iterator[Any]:  # noqa: F811
    """A copy of the run, its grid, and what was sent to whom."""
    shutil.copytree(finished, tmp_path / "runs" / finished.name)
    place = Place.of(tmp_path / "runs" / finished.name)
    grid = InProcessGrid(client_app, 2)
    yield _Live(place, grid, tmp_path)
    grid.close()
    Worker.close_current()


class _Live:
    def __init__(self, place: Place, grid: InProcessGrid, folder: Path) -> None:
        self.place, self.grid = place, grid
        self.desk = Desk(place, lambda: RunHoldings(place.folder.path))
        self.site = create_key(folder / "keys", "client-000")
        self.key = folder / "keys" / "client-000.key"
        known = ["client-000", "client-001"]
        place.registry.with_site(self.site.name, self.site.public, self.site.salt, known=known).save()
        self.sent: dict[int, list[Instruction]] = {}
        push = grid.push_messages

        def watched(messages: Any) -> Any:
            kept = list(messages)
            for message in kept:
                instruction = Instruction.from_records(message.content)
                self.sent.setdefault(message.metadata.dst_node_id, []).append(instruction)
            return push(kept)

        grid.push_messages = watched  # type: ignore[method-assign]

    def node(self, client: int, **config: Any) -> None:
        self.grid._contexts[client + 1].node_config.update(config)

    def serve(self) -> list[Any]:
        config = config_of(self.place.folder).changed(join_timeout=5.0)
        view = make_view("quiet")
        with open_deployment(self.grid, self.place.folder, config, view, Stop()) as deployment:
            assert isinstance(deployment, Deployment)
            return serve_queue(deployment, tell=lambda text: None)

    def request(self, *, plan: Plan) -> Any:
        holding = self.desk.holdings.holding("client-000")
        assert holding is not None
        drawn = [each for each, number in holding.first_round.items() if number == 2][:2]
        never = [s.id for s in holding.train if s.id not in holding.first_round][:1]
        return ask(self.desk, self.site, [*drawn, *never], plan=plan)


PLAN = Plan(method="loku", rank=1, rounds=2, steps=2, utility_floor=0.1)


def test_a_live_job_ends_at_the_bits_of_the_local_one_and_tells_others_nothing(live: Any) -> None:
    job = live.request(plan=PLAN)
    twin = live.place.folder.path.parent.parent / "twin" / live.place.folder.id
    shutil.copytree(live.place.folder.path, twin)
    live.node(0, key=str(live.key))
    (done,) = live.serve()
    assert done.state is State.COMMITTED, done.note

    other = Place.of(twin)
    (same,) = work(Desk(other, lambda: RunHoldings(twin)), LokuRunner(), other.server_key())
    assert same.state is State.COMMITTED, same.note
    assert live.place.adapter()[1] == other.adapter()[1]
    ours, theirs = (
        verify_receipt(
            place.receipt(job.id).read_bytes(), place.server_key().public, log=place.root / "log.jsonl"
        )
        for place in (live.place, other)
    )
    for name in ("metrics", "thresholds", "scope", "forget_set_of_the_batch", "approximations", "adapter"):
        assert ours[name] == theirs[name], name
    assert theirs["site_statement"] == "not available"

    # The owner's own word, which the server cannot have written.
    said = ours["site_statement"]
    assert said["public_key"] == live.site.public
    assert valid_signature(live.site.public, STATEMENT, canonical(said["statement"]), said["signature"])
    assert said["statement"]["adapter"] == ours["adapter"]["after"]
    assert said["statement"]["requests"] == [ours["request_sha256"]]
    assert said["statement"]["figures"]["forget"] == ours["metrics"]["after"]["forget"]

    # Nobody but the owner learns who forgets what; the tasks are the same.
    asked = {
        node: [Ask.from_advice(i.advice) for i in sent if NAME in i.advice]
        for node, sent in live.sent.items()
    }
    assert any(each.forget for each in asked[1])
    assert not any(each.forget for each in asked[2])
    whole = json.dumps([i.advice for i in live.sent[2]])
    assert "client-000" not in whole
    assert not any(each in whole for each in job.request["ids"])
    assert {"train", "measure"} <= {each.task for each in asked[2]}


def test_a_site_does_only_what_its_key_has_signed(live: Any, tmp_path: Path) -> None:
    live.request(plan=PLAN)
    stranger = create_key(tmp_path / "other", "client-000")
    live.node(0, key=str(tmp_path / "other" / "client-000.key"))
    assert stranger.public != live.site.public
    before = live.place.adapter()[1]
    (failed,) = live.serve()
    assert failed.state is State.FAILED
    assert "its own key has not signed" in failed.note
    assert live.place.adapter()[1] == before


def test_an_owner_that_is_not_connected_keeps_the_job_waiting(live: Any) -> None:
    job = live.request(plan=PLAN)
    del live.grid._contexts[1]
    config = config_of(live.place.folder).changed(clients=1)
    with open_deployment(live.grid, live.place.folder, config, make_view("quiet"), Stop()) as deployment:
        (waiting,) = serve_queue(deployment, tell=lambda text: None)
    assert waiting.state is State.QUEUED
    assert "client-000 is not connected" in waiting.note
    assert job.id == waiting.id


def test_whoever_ordered_the_work_reads_how_it_ended(live: Any) -> None:
    folder = live.place.folder
    settings = config_of(folder).changed(join_timeout=60.0, runs_dir=str(folder.path.parent))
    serve(live.grid, folder.id, settings)
    said = [event["text"] for event in folder.events()]
    assert said[-2:] == ["unlearning: nothing to do", ENDED]
    live.grid._contexts.clear()
    with pytest.raises(RunError, match="only 0 of 2 clients connected"):
        serve(live.grid, folder.id, settings.changed(join_timeout=0.1))
    assert folder.events()[-1]["text"].startswith(f"{ENDED_EARLY}only 0 of 2 clients connected")
    assert "error" not in {event["level"] for event in folder.events()}  # the run itself is as good as it was


def test_what_live_sites_cannot_do_fails_with_the_reason(live: Any) -> None:
    job = live.request(plan=Plan(method="retrain"))
    (failed,) = live.serve()
    assert failed.state is State.FAILED
    assert "not done through live sites" in failed.note
    assert sha256_hex(live.place.adapter()[1]) == live.place.adapter()[0]
    assert job.id == failed.id


@pytest.mark.parametrize(
    ("changes", "method", "words"),
    [({}, "kl", "whole distributions"), ({"exchange": "label-private"}, "loku", "label-private")],
)
def test_what_a_host_does_not_give_is_refused_before_anything_is_computed(
    live: Any, changes: dict[str, str], method: str, words: str
) -> None:
    config = config_of(live.place.folder).changed(**changes)
    with pytest.raises(ConfigError, match=words):
        _refuse_early(method, config)
    _refuse_early("loku", config_of(live.place.folder))


def test_live_owners_say_what_an_adapter_knows_of_earlier_sets(live: Any) -> None:
    job = live.request(plan=PLAN)
    live.serve()
    known = read_tombstones(live.place.folder.path)
    assert [each.job for each in known.sets] == [job.id]
    config = config_of(live.place.folder).changed(join_timeout=5.0)
    request = UnlearnRequest(run=live.place.folder.path, client="client-000", samples=())
    with open_deployment(live.grid, live.place.folder, config, make_view("quiet"), Stop()) as deployment:
        told = Forget("loku", live.site.salt, (), (), known.epoch)
        parties = LiveParties(deployment, request, get_method("loku"), told, lambda: False)
        found = parties.earlier(parties.leaves, known)[job.id]
        lost = parties.earlier(parties.leaves, Tombstones(1, (replace(known.sets[0], job="u0009"),)))
    assert found["samples"] == len(job.request["ids"])
    assert found["level"] == known.sets[0].level
    assert not found["back"]  # the committed adapter, and the level is the commit's
    assert lost == {"u0009": None}
