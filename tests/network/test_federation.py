"""Institutions for real: TLS, node keys, run tokens; they tune what the simulation tunes, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Sandbox, free_port
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]  # three minutes of CPU time: too long for every change

SITES = ("client-000", "client-001", "client-002")
SMALL = [
    *("--rounds", "3", "--samples", "32", "--alpha", "5.0", "--evaluate-samples", "8"),
    *("--final-samples", "16", "--rank", "4", "--rule", "fisher", "--fisher-samples", "8"),
]
Wait = Callable[[Callable[[], bool], float, str], None]

PLAN = """\
name = "hospitals"
sites = ["client-000", "client-001", "client-002"]
[server]
names = ["127.0.0.1"]
listen = "127.0.0.1"
fleet-port = {fleet}
host-port = {host}
"""


def provision(sandbox: Sandbox) -> None:
    (sandbox.folder / "federation.toml").write_text(PLAN.format(fleet=free_port(), host=free_port()))
    sandbox.run("fednano", "deploy", "init", "federation.toml")
    for number, site in enumerate(SITES):
        letters = "federation/invitations"
        invitation = f"{letters}/{site}.invitation.json"
        sandbox.run(
            *("fednano", "deploy", "enroll", invitation, "--bundle", site, "--partition", f"{number}/3")
        )
        sandbox.run("fednano", "deploy", "sign", f"{site}/{site}.request.json")
        sandbox.run("fednano", "deploy", "enroll", f"{letters}/{site}.signed.json", "--bundle", site)


def status(sandbox: Sandbox, *options: str) -> dict[str, Any]:
    done = sandbox.run("fednano", "status", "--json", *options, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def pid_of(sandbox: Sandbox, name: str, *options: str) -> int:
    found = {each["name"]: each["pid"] for each in status(sandbox, *options)["processes"]}
    pid: int = found[name]
    return pid


def rounds(sandbox: Sandbox) -> int:
    runs = [path for path in (sandbox.folder / "federation/server/runs").glob("2*") if path.is_dir()]
    return max((len(list((run / "checkpoints").glob("round-*"))) for run in runs), default=0)


def test_three_institutions_tune_what_the_simulation_tunes_though_parts_are_killed(
    sandbox: Sandbox, wait_for: Wait
) -> None:
    provision(sandbox)
    server = sandbox.start("fednano", "server", "up", name="server")
    clients = [sandbox.start("fednano", "client", "up", "--bundle", site, name=site) for site in SITES]
    running = sandbox.start("fednano", "run", "--json", *SMALL, name="order")
    reference = sandbox.run(
        *("fednano", "simulate", "--backend", "inprocess", "--clients", "3", "--runs-dir", "reference"),
        *("--progress", "quiet", *SMALL),
    )
    assert reference.returncode == 0
    # Round 1 undisturbed; in the later ones, one part after the other dies in the middle of its work.
    for done, name, options in (
        (1, "host", ()),
        (1, "worker", ("--bundle", "client-000")),
        (2, "superlink", ()),
    ):
        wait_for(lambda done=done: rounds(sandbox) >= done, 900, f"round {done}")
        os.kill(pid_of(sandbox, name, *options), signal.SIGKILL)
    assert running.wait(1200) == 0, sandbox.logs()

    told = json.loads((sandbox.folder / "order.log").read_text())
    assert told["state"] == "done"
    assert told["summary"]["rounds"] == 3
    run = sandbox.folder / "federation/server/runs" / told["run"]
    expected = next((sandbox.folder / "reference").glob("2*")) / "adapter.safetensors"
    ours, theirs = load_file(run / "adapter.safetensors"), load_file(expected)
    assert set(ours) == set(theirs)
    assert all(ours[name].equal(theirs[name]) for name in ours)

    found = status(sandbox)
    assert {site["site"]: site["connected"] for site in found["sites"]} == dict.fromkeys(SITES, True)
    restarts = {each["name"]: each["restarts"] for each in found["processes"]}
    assert restarts == {"superlink": 1, "host": 1}
    assert status(sandbox, "--bundle", "client-000")["up"]
    # What happened is in the log, and the log is whole.
    sandbox.run("fednano", "audit", "verify")
    events = [
        json.loads(line) for line in sandbox.run("fednano", "audit", "show", "--json").stdout.splitlines()
    ]
    kinds = [event["kind"] for event in events]
    accepted = [e["details"] for e in events if e["kind"] == "update accepted"]
    assert {(each["site"], each["round"]) for each in accepted} >= {(s, r) for s in SITES for r in (1, 2, 3)}
    assert {"joined", "token", "run started", "run resumed", "run finished"} <= set(kinds)

    # A revoked site is shut out while the server runs; then everything ends in order, and nothing is left.
    sandbox.run("fednano", "deploy", "revoke", "client-002")
    wait_for(
        lambda: "node unregistered" in sandbox.run("fednano", "audit", "show").stdout, 60, "the revocation"
    )
    for process in (*clients, server):
        os.kill(process.pid, signal.SIGTERM)
    assert [process.wait(60) for process in (*clients, server)] == [0, 0, 0, 0]
    wait_for(lambda: not sandbox.leftovers(), 30, "the processes to end")
    assert status(sandbox) == {"up": False, "folder": "federation/server"}
    assert sandbox.run("fednano", "status", check=False).returncode == 5
    assert not list(Path(sandbox.folder).rglob("*.tmp"))
