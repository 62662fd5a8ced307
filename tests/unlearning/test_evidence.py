"""Probes after the commit, the page of a job, protections that a job cannot keep, and earlier forget sets."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from job_world import FakeRunner, World
from test_end_to_end import ask, finished  # noqa: F401 - a fixture
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.errors import ConfigError, JobStateError, ReceiptInvalid, RunError
from fednano.federation.config import RunConfig
from fednano.runs import RunFolder
from fednano.security.canonical import sha256_hex
from fednano.unlearning.jobs.evidence import add_evidence, verify_evidence
from fednano.unlearning.jobs.loku import LokuRunner, with_earlier
from fednano.unlearning.jobs.receipt import verify_receipt
from fednano.unlearning.jobs.report import job_report_html
from fednano.unlearning.jobs.runner import Result
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.work import work
from fednano.unlearning.probes import check_probes, is_back, quantised
from fednano.unlearning.protection import lost_protection


@pytest.fixture
def committed(tmp_path: Path) -> tuple[World, Any]:
    world = World(tmp_path)
    figures = {
        "forget": {"exact_memorisation": 0.9, "probability": 0.8},
        "unseen": {"exact_memorisation": 0.2},
    }
    after = {**figures, "forget": {"exact_memorisation": 0.1, "probability": 0.1}}
    world.desk.submit(world.request(reason="<script>alert(1)</script>"), actor="site")
    (done,) = work(world.desk, FakeRunner({"before": figures, "after": after}), world.server)
    assert done.state is State.COMMITTED, done.note
    return world, done


PROBES = {"int8": {"samples": 3, "exact_memorisation": 0.1, "level": 0.2, "back": False}, "image-only": None}


def test_what_probes_found_is_signed_logged_and_shown(committed: tuple[World, Any]) -> None:
    world, job = committed
    receipt = world.place.receipt(job.id).read_bytes()
    path = add_evidence(world.place, job, PROBES, world.server)
    body = verify_evidence(path.read_bytes(), world.server.public)
    assert body["probes"] == {"int8": PROBES["int8"], "image-only": "not available"}
    assert (
        body["receipt_sha256"] == sha256_hex(receipt) == sha256_hex(world.place.receipt(job.id).read_bytes())
    )
    entries = world.place.ledger.verify(world.server.public)
    assert [entry["kind"] for entry in entries] == ["receipt", "probes"]
    assert entries[1]["sha256"] == sha256_hex(path.read_bytes())
    verify_receipt(receipt, world.server.public, log=world.place.root / "log.jsonl")
    assert world.desk.store.job(job.id).facts["probes"] == PROBES
    shown = CliRunner().invoke(app, ["unlearn", "show", job.id, "--run", str(world.run)])
    assert "probe int8" in shown.output
    assert "holds" in shown.output
    later = add_evidence(world.place, world.desk.store.job(job.id), {"int4": PROBES["int8"]}, world.server)
    assert later != path
    assert set(world.desk.store.job(job.id).facts["probes"]) == {"int8", "int4", "image-only"}


@pytest.mark.parametrize("change", [(b"false", b"true "), (b'"back"', b'"bacK"'), (b"0.2", b"0.3")])
def test_changed_evidence_is_found(committed: tuple[World, Any], change: tuple[bytes, bytes]) -> None:
    world, job = committed
    content = add_evidence(world.place, job, PROBES, world.server).read_bytes()
    assert change[0] in content
    with pytest.raises(ReceiptInvalid):
        verify_evidence(content.replace(*change), world.server.public)
    with pytest.raises(ReceiptInvalid):
        verify_evidence(content, "0" * 64)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_of_a_job_shows_its_record_and_loads_nothing(committed: tuple[World, Any]) -> None:
    world, job = committed
    add_evidence(world.place, job, PROBES, world.server)
    html = job_report_html(world.desk, job.id)
    page = _Page()
    page.feed(html)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text  # the reason, escaped
    assert sha256_hex(world.place.receipt(job.id).read_bytes()) in page.text
    for words in ("90.0 %", "10.0 %", "Round by round", "int8", "not available", world.run.name):
        assert words in page.text, words
    assert not any(each in html for each in world.ids())
    done = CliRunner().invoke(app, ["unlearn", "report", job.id, "--run", str(world.run), "--json"])
    assert Path(json.loads(done.stdout)["report"]).read_text() == html


def test_the_page_of_a_rejected_job_says_why(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.desk.submit(world.request(), actor="site")
    runner = FakeRunner({"accepted": False, "reasons": ("too dear",)})
    (job,) = work(world.desk, runner, world.server)
    assert job.state is State.REJECTED
    html = job_report_html(world.desk, job.id)
    assert "too dear" in html
    assert "none: a job gets one when it is committed" in html


def test_probes_are_named_and_made_of_committed_jobs_only(tmp_path: Path) -> None:
    assert check_probes("int8, relearning,int8") == ("int8", "relearning")
    with pytest.raises(ConfigError, match="there are: relearning, int8"):
        check_probes("int3")
    with pytest.raises(ConfigError, match="no probe"):
        check_probes(" , ")
    world = World(tmp_path)
    world.desk.submit(world.request(), actor="site")
    from fednano.unlearning.jobs.evidence import probe_committed

    with pytest.raises(JobStateError, match="is queued"):
        probe_committed(world.place, world.desk.store.job("u0001"), ("int8",), data={}, paraphrases={})


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_rounding_is_to_the_nearest_of_so_many_numbers(bits: int, rows: int, columns: int, seed: int) -> None:
    leaf = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = quantised({"A": leaf}, bits)["A"]
    step = leaf.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert bool(((found - leaf).abs() <= step / 2 * (1 + 1e-4)).all())
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)
    torch.testing.assert_close(quantised({"A": found}, bits)["A"], found)
    assert not bool(quantised({"A": torch.zeros(2, 3)}, bits)["A"].any())


def test_a_job_that_would_bring_an_earlier_set_back_is_not_committed() -> None:
    fine = {"samples": 50, "exact_memorisation": 0.2, "level": 0.2, "back": is_back(0.2, 0.2, 50)}
    back = {"samples": 50, "exact_memorisation": 0.9, "level": 0.2, "back": is_back(0.9, 0.2, 50)}
    good = with_earlier(Result(payload=b""), {"u0001": fine, "u0002": None})
    assert good.accepted
    bad = with_earlier(Result(payload=b""), {"u0001": fine, "u0002": back})
    assert not bad.accepted
    assert "job u0002 forgot" in bad.reasons[0]
    assert not with_earlier(replace(Result(payload=b""), accepted=False), {}).accepted


@pytest.mark.parametrize("setting", [{"dp": "client"}, {"secure-aggregation": True}])
def test_jobs_on_protected_runs_wait_until_it_is_allowed(tmp_path: Path, setting: dict[str, Any]) -> None:
    assert lost_protection(RunConfig()) == ()
    assert len(lost_protection(RunConfig.from_mapping(setting))) == 1
    world = World(tmp_path)
    RunFolder(world.run).write_json("config.json", {"cache-dir": "", **setting})
    world.desk.submit(world.request(), actor="site")
    with pytest.raises(RunError, match="--allow-unprotected"):
        work(world.desk, LokuRunner(), world.server)
    (job,) = world.desk.store.jobs()
    assert job.state is State.QUEUED


def test_probes_of_a_real_run_look_at_the_forgotten_samples(finished: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two jobs after each other: the first one's samples are probed by command, and again at the second commit."""
    import shutil

    from fednano.security.keys import create_key
    from fednano.unlearning.jobs.desk import Desk
    from fednano.unlearning.jobs.holdings import RunHoldings
    from fednano.unlearning.jobs.place import Place
    from fednano.unlearning.jobs.request import Plan

    shutil.copytree(finished, tmp_path / "runs" / finished.name)
    place = Place.of(tmp_path / "runs" / finished.name)
    desk = Desk(place, lambda: RunHoldings(place.folder.path))
    keys = [create_key(tmp_path / "keys", name) for name in ("client-000", "client-001")]
    for key in keys:
        known = [each.name for each in keys]
        place.registry.with_site(key.name, key.public, key.salt, known=known).save()
    plans = (Plan(rank=1, rounds=2, steps=2, utility_floor=0.1), Plan(method="retrain"))
    receipts = []
    for key, plan, probes in zip(keys, plans, ((), ("int8",)), strict=True):
        holding = desk.holdings.holding(key.name)
        assert holding is not None
        own = holding.first_round
        drawn = [each for each in own if own[each] == max(own.values())][:2]
        ask(desk, key, drawn, plan=plan)
        (job,) = work(desk, LokuRunner(probes=probes), place.server_key())
        assert job.state is State.COMMITTED, job.note
        receipts.append(json.loads(place.receipt(job.id).read_bytes())["receipt"])
    assert receipts[0]["earlier_forget_sets"] == receipts[0]["probes"] == "not available"
    assert receipts[1]["earlier_forget_sets"]["u0001"]["samples"] == 2
    assert receipts[1]["probes"]["int8"]["samples"] == 2
    done = CliRunner().invoke(
        app,
        [
            *("unlearn", "verify", "u0001", "--run", str(place.folder.path), "--json"),
            *("--probe", "int4,paraphrase,relearning,image-only,text-only"),
        ],
    )
    found = json.loads(done.stdout)["probes"]
    assert set(found) == {"int4", "paraphrase", "relearning", "image-only", "text-only"}
    assert found["image-only"] is found["text-only"] is None  # of samples without pictures
    assert all(found[name]["samples"] == 2 for name in ("int4", "paraphrase", "relearning"))
    assert found["relearning"]["steps"] == [1, 2, 5, 10]
    assert found["relearning"]["probability"]["relearned"][-1] > found["relearning"]["start"]["relearned"]
