"""Institutions for real: TLS, node keys, tokens. They tune what a simulation tunes, and forget, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from institutions import (
    SERVER,
    SITES,
    app_pid,
    is_asked,
    is_up,
    kill,
    make_data,
    pid_of,
    provision,
    rounds,
    run_folders,
    simulated,
    status,
)
from processes import Sandbox
from safetensors.torch import load_file
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.deploy.jobs import listed

pytestmark = [pytest.mark.network, pytest.mark.timeout(1800)]

SMALL = {
    "rounds": 3,
    "samples": 48,
    "batch-size": 8,
    "learning-rate": 0.01,
    "holdout": 0.0,
    "evaluate-every": 0,
    "final-samples": 8,
    "rank": 8,
    "rule": "fisher",
    "fisher-samples": 8,
}
OWNER, LOST = SITES[1:]
PLAN = ("--rounds", "4", "--steps", "8", "--rank", "8", "--utility-floor", "0.01")
GONE = "".join(f"named/{number}\n" for number in (0, 1))
Wait = Callable[[Callable[[], bool], float, str], None]


def fednano(*words: str) -> str:
    """A command in this process: starting one costs more than what it does."""
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_three_institutions_tune_what_the_simulation_tunes_and_forget_though_parts_are_killed(
    sandbox: Sandbox, wait_for: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sandbox.folder)
    data = sandbox.folder / "data"
    make_data(data)
    provision(sandbox, data=data / "sites")
    server = sandbox.start("fednano", "server", "up", name="server")
    fednano("unlearn", "keygen", "--site", OWNER, "--keys", f"{OWNER}/keys")
    settings = {**SMALL, "dataset": str(data)}
    expected = simulated(sandbox.folder / "reference", settings, clients=3)
    wait_for(lambda: is_up(sandbox), 300, "the server")
    clients = [sandbox.start("fednano", "client", "up", "--bundle", site, name=site) for site in SITES]
    options = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    running = sandbox.start("fednano", "run", "--json", *options, name="order")
    # Round 1 undisturbed; in the later ones, one part after the other dies in the middle of its work.
    for done, name, place in ((1, "host", SERVER), (1, "worker", SITES[0]), (2, "superlink", SERVER)):
        wait_for(lambda done=done: rounds(sandbox) >= done, 900, f"round {done}")
        kill(pid_of(sandbox, name, place))
        if name == "worker":  # and a SuperNode, with the request of that round
            wait_for(lambda: is_asked(sandbox, LOST, 2), 120, "the request of round 2")
            kill(pid_of(sandbox, "supernode", LOST))
    assert running.wait(1200) == 0, sandbox.logs()

    told = json.loads((sandbox.folder / "order.log").read_text())
    assert told["state"] == "done"
    assert told["summary"]["rounds"] == 3
    (run,) = run_folders(sandbox)
    assert run.name == told["run"]
    tuned = load_file(run / "adapter.safetensors")
    assert set(tuned) == set(expected)
    assert all(tuned[name].equal(expected[name]) for name in expected)
    # One of them withdraws samples. The server does the rest by itself, though its app dies in the middle of it.
    at = ("--runs-dir", f"{SERVER}/runs", "--run", run.name)
    ids, request = sandbox.folder / "ids.txt", sandbox.folder / "request.json"
    ids.write_text(GONE)
    fednano("unlearn", "register", f"{OWNER}/keys/{OWNER}.card.json", *at)
    own = f"{OWNER}={data / 'sites' / OWNER}"
    fednano(
        *("unlearn", "submit", "--site", OWNER, "--key", f"{OWNER}/keys/{OWNER}.key", "--data", own),
        *("--samples", str(ids), "--reason", "Art. 17", *PLAN, "--out", str(request), *at),
    )
    fednano("unlearn", "submit", "--request", str(request), *at)

    def state() -> str:
        (job,) = listed(run.parent)
        return job.state

    wait_for(lambda: state() == "running", 300, "the job to run")
    kill(app_pid(sandbox))
    wait_for(lambda: state() in ("committed", "rejected", "failed"), 600, "the job's end")
    (job,) = status(sandbox)["jobs"]
    assert (job["state"], job["site"]) == ("committed", OWNER), sandbox.logs()
    receipt = sandbox.folder / "receipt.json"
    fednano("unlearn", "receipt", job["job"], "--out", str(receipt), *at)
    key = run / "unlearning" / "server.pub"
    checked = fednano("unlearn", "verify-receipt", str(receipt), "--key", str(key), "--json")
    body = json.loads(checked)["receipt"]
    assert body["scope"]["samples"] == 2
    figures = body["metrics"]
    assert figures["after"]["forget"]["probability"] < figures["before"]["forget"]["probability"]
    # The owner has checked its own signature, and signed what it measured.
    assert body["site_statement"]["statement"]["adapter"] == body["adapter"]["after"]
    assert not any(each in receipt.read_text() for each in GONE.split())

    found = status(sandbox)
    assert {site["site"]: site["connected"] for site in found["sites"]} == dict.fromkeys(SITES, True)
    restarts = {each["name"]: each["restarts"] for each in found["processes"]}
    assert restarts == {"superlink": 1, "host": 1}
    assert status(sandbox, "--bundle", SITES[0])["up"]
    # What happened is in the log, and the log is whole.
    sandbox.run("fednano", "audit", "verify")
    events = [
        json.loads(line) for line in sandbox.run("fednano", "audit", "show", "--json").stdout.splitlines()
    ]
    kinds = [event["kind"] for event in events]
    accepted = [e["details"] for e in events if e["kind"] == "update accepted"]
    assert {(each["site"], each["round"]) for each in accepted} >= {(s, r) for s in SITES for r in (1, 2, 3)}
    again = [e["details"] for e in events if e["kind"] == "asked again"]
    assert (LOST, 2) in {(each["site"], each["round"]) for each in again}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    second = [r for r in records if r.get("client") == LOST and r["round"] == 2 and r["phase"] == "federated"]
    assert [(r["asked_again"], "refused" in r) for r in second] == [(1, False)]
    assert {"joined", "token", "run started", "run resumed", "run finished"} <= set(kinds)
    assert kinds.count("jobs started") == 2
    (outcome,) = [event["details"] for event in events if event["kind"] == "job"]
    assert outcome == {"job": job["job"], "run": run.name, "site": OWNER, "state": "committed"}

    # A revoked site is shut out while the server runs; then everything ends in order, and nothing is left.
    sandbox.run("fednano", "deploy", "revoke", SITES[2])
    wait_for(
        lambda: "node unregistered" in sandbox.run("fednano", "audit", "show").stdout, 60, "the revocation"
    )
    for process in (*clients, server):
        os.kill(process.pid, signal.SIGTERM)
    assert [process.wait(60) for process in (*clients, server)] == [0, 0, 0, 0]
    wait_for(lambda: not sandbox.leftovers(), 30, "the processes to end")
    assert status(sandbox) == {"up": False, "folder": SERVER}
    assert sandbox.run("fednano", "status", check=False).returncode == 5
    assert not list(Path(sandbox.folder).rglob("*.tmp"))
