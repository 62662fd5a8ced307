"""A real run, a real request, the real runner: from the key to the receipt, and a later run without the samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fednano.errors import ConfigError, RunError
from fednano.federation import client_task
from fednano.federation.config import RunConfig
from fednano.federation.simulation import simulate
from fednano.runs import RunFolder, make_view
from fednano.security.keys import Signer, create_key
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.holdings import RunHoldings, choose
from fednano.unlearning.jobs.job import Job
from fednano.unlearning.jobs.loku import LokuRunner
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.purge import inventory
from fednano.unlearning.jobs.receipt import verify_receipt
from fednano.unlearning.jobs.request import Plan, sign_request
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.work import work

PLAN = Plan(method="retrain", rounds=1, steps=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients, two rounds, sixty questions without pictures."""
    root = tmp_path_factory.mktemp("run")
    data = root / "colours"
    data.mkdir()
    for split, count in (("train", 60), ("test", 6)):
        rows = [
            {
                "question": f"what color is thing {n}?",
                "answer": ("red", "blue")[n % 2],
                "id": f"thing-{n % 10}/{n}",
            }
            for n in range(count)
        ]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = RunConfig(
        dataset=str(data),
        clients=2,
        partition="iid",
        rounds=2,
        samples=8,
        batch_size=8,
        rank=2,
        holdout=0.1,
        evaluate_every=0,
        placement="local",
        runs_dir=str(root / "runs"),
    )
    return simulate(config, backend="inprocess", view=make_view("quiet"))


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Place:
    shutil.copytree(finished, tmp_path / "runs" / finished.name)
    return Place.of(tmp_path / "runs" / finished.name)


@pytest.fixture
def desk(place: Place) -> Desk:
    return Desk(place, lambda: RunHoldings(place.folder.path))


@pytest.fixture
def site(place: Place, tmp_path: Path) -> Signer:
    key = create_key(tmp_path / "keys", "client-000")
    place.registry.with_site(key.name, key.public, key.salt, known=["client-000", "client-001"]).save()
    return key


def ask(desk: Desk, site: Signer, ids: list[str], **changes: Any) -> Job:
    values = {"kind": "samples", "name": "", "plan": PLAN, "reason": "x", **changes}
    return desk.submit(sign_request(site, run=desk.place.folder.id, ids=ids, **values), actor="test")[0]


def test_holdings_know_what_every_round_drew(finished: Path) -> None:
    holdings = RunHoldings(finished)
    holding = holdings.holding("client-000")
    assert holding is not None
    assert holdings.sites() == {"client-000": 27, "client-001": 27}
    assert len(holding.train) == 27
    assert len(holding.held_out) == 3
    # 8 samples a round without repetition
    assert sorted(holding.first_round.values()) == [1] * 8 + [2] * 8
    assert holdings.base_model() == ""
    thing = choose(holding, "subject", "thing-3")
    assert thing
    assert all(each.startswith("thing-3/") for each in thing)
    with pytest.raises(ConfigError, match="took no part"):
        RunHoldings(finished, {"elsewhere": finished})


def test_from_key_to_receipt_to_a_run_without_the_samples(
    desk: Desk, site: Signer, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding = desk.holdings.holding("client-000")
    assert holding is not None
    second = [each for each, number in holding.first_round.items() if number == 2][:2]
    before = place.adapter()[1]
    job = ask(desk, site, second)
    assert (job.state, job.facts["first_exposure"]) == (State.QUEUED, 2)
    (done,) = work(desk, LokuRunner(), place.server_key())
    assert done.state is State.COMMITTED, done.note
    body = verify_receipt(
        place.receipt(job.id).read_bytes(), place.server_key().public, log=place.root / "log.jsonl"
    )
    assert body["stopped"] == "retrained"
    assert body["approximations"] == []
    assert body["metrics"]["after"]["forget"]["samples"] == 2
    assert body["cost"]["bytes"] > 0
    assert place.adapter()[1] != before
    leaves, info = RunFolder(place.folder.path).load_adapter()
    assert leaves
    assert info["unlearned"] == ["u0001"]
    # only the checkpoint of the round that met them is tainted
    listed = [item.what for item in inventory(place, job.id) if item.kind == "checkpoint"]
    assert listed == ["checkpoints/round-0002"]

    again = ask(Desk(place, lambda: RunHoldings(place.folder.path)), site, second[:1])
    assert again.state is State.REJECTED
    assert "forgotten already" in again.note

    seen: set[str] = set()
    real = client_task.contribute

    def watched(worker: Any, instruction: Any, llm: Any, data: Any, *rest: Any, **named: Any) -> Any:
        seen.update(sample.id for sample in data.samples)
        return real(worker, instruction, llm, data, *rest, **named)

    monkeypatch.setattr(client_task, "contribute", watched)
    config = RunConfig.from_mapping(
        {k: v for k, v in place.folder.config().items() if k not in ("created", "command")}
    )
    child = config.changed(
        start_from=str(place.folder.path), runs_dir=str(place.folder.path.parent), rounds=1
    )
    path = simulate(child, backend="inprocess", view=make_view("quiet"))
    assert len(seen) == 52
    assert not seen & set(second)
    found = {item.what: item.kind for item in inventory(place, job.id)}
    assert found[path.name] == "run"


def test_a_retrained_reference_stands_in_the_receipt_when_asked_for(
    desk: Desk, site: Signer, place: Place
) -> None:
    holding = desk.holdings.holding("client-000")
    assert holding is not None
    second = [each for each, number in holding.first_round.items() if number == 2][:2]
    job = ask(desk, site, second, plan=Plan(method="ihl", rounds=1, steps=1, utility_floor=0.1))
    (done,) = work(desk, LokuRunner(reference=True), place.server_key())
    assert done.state is State.COMMITTED, done.note
    body = verify_receipt(
        place.receipt(job.id).read_bytes(), place.server_key().public, log=place.root / "log.jsonl"
    )
    assert body["reference"] == "retrained"
    ours, theirs = body["metrics"]["after"]["forget"], body["metrics"]["reference"]["forget"]
    gap = body["metrics"]["reference"]["comparison"]["exact_memorisation_gap"]
    assert gap == pytest.approx(ours["exact_memorisation"] - theirs["exact_memorisation"])
    assert body["cost"]["client_seconds"] > 0


def test_another_base_model_is_seen_before_anything_is_done(desk: Desk, site: Signer, place: Place) -> None:
    info = place.folder.read_json("adapter.json")
    place.folder.write_json("adapter.json", {**info, "edge": "0" * 64})
    holding = desk.holdings.holding("client-000")
    assert holding is not None
    job = ask(desk, site, list(holding.first_round)[:1])
    assert job.state is State.REJECTED
    assert "made on another base model" in job.note


def test_an_unknown_method_and_an_unfinished_run(desk: Desk, site: Signer, place: Place) -> None:
    holding = desk.holdings.holding("client-000")
    assert holding is not None
    ids = list(holding.first_round)[:1]
    job = ask(desk, site, ids, plan=Plan(method="magic"))
    assert "unknown unlearning method 'magic'" in job.note
    (place.folder.path / "adapter.json").unlink()
    job = ask(desk, site, ids)
    assert "no final adapter yet" in job.note
    (place.folder.path / "partition.json").unlink()
    with pytest.raises(RunError, match="does not exist"):
        RunHoldings(place.folder.path)
