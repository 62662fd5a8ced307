"""A site that misses a deadline is left out of that round and said so; one whose process dies is asked again in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from institutions import (
    SITES,
    is_asked,
    is_up,
    kill,
    make_data,
    pid_of,
    provision,
    rounds,
    run_folders,
    simulated,
)
from processes import Sandbox, processes_of
from safetensors.torch import load_file

from fednano.federation import inprocess
from fednano.federation.messages import Instruction

pytestmark = [
    pytest.mark.slow,  # some two minutes each on two cores, one of which is the deadline, or Flower's patience
    pytest.mark.timeout(1200),
]

SITE, ROUND = SITES[1], 2  # who is disturbed, and when
DEADLINE_S = 60.0
SETTLED_S = 15.0  # so that Flower's process has handed its message to the worker, which is stopped
SETTINGS = {
    "samples": 16,
    "batch-size": 8,
    "holdout": 0.0,
    "evaluate-every": 0,
    "final-samples": 8,
    "rank": 4,
    "rule": "fedavg",
    "min-replies": 2,
}
Wait = Callable[[Callable[[], bool], float, str], None]


class WithoutOne(inprocess.InProcessGrid):
    """A simulation in which the site does not answer in the round whose deadline it misses."""

    def _handle(self, message: Message) -> Message:
        slow = message.metadata.dst_node_id == 1 + SITES.index(SITE)
        trains = message.metadata.message_type == "train"
        if slow and trains and Instruction.from_records(message.content).round == ROUND:
            return Message(Error(code=0, reason="too slow"), reply_to=message)
        return super()._handle(message)


@dataclass
class Running:
    """A federation at work on one run, up to the round in which the site is disturbed."""

    sandbox: Sandbox
    order: subprocess.Popen[bytes]
    worker: int
    services: list[subprocess.Popen[bytes]]

    def end(self) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        """Wait for the run and end the services; its adapter, its lines on clients and the events of the audit log."""
        assert self.order.wait(900) == 0, self.sandbox.logs()
        (run,) = run_folders(self.sandbox)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shown = self.sandbox.run("fednano", "audit", "show", "--json").stdout.splitlines()
        for process in self.services:
            os.kill(process.pid, signal.SIGTERM)
        assert [process.wait(60) for process in self.services] == [0] * len(self.services)
        rows = [line for line in lines if line["phase"] == "federated" and line["scope"] == "client"]
        return load_file(run / "adapter.safetensors"), rows, [json.loads(event) for event in shown]


@contextmanager
def stopped(
    sandbox: Sandbox, wait_for: Wait, data: Path, sites: tuple[str, ...], settings: dict[str, Any]
) -> Iterator[Running]:
    """A federation whose one site has its worker stopped in the middle of a round, for as long as the block lasts."""
    provision(sandbox, sites, data=data / "sites")
    server = sandbox.start("fednano", "server", "up", name="server")
    wait_for(lambda: is_up(sandbox), 300, "the server")
    clients = [sandbox.start("fednano", "client", "up", "--bundle", site, name=site) for site in sites]
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    order = sandbox.start("fednano", "run", "--json", *words, name="order")
    wait_for(lambda: rounds(sandbox) >= ROUND - 1, 600, f"round {ROUND - 1}")
    worker = pid_of(sandbox, "worker", SITE)
    os.kill(worker, signal.SIGSTOP)
    try:
        wait_for(lambda: is_asked(sandbox, SITE, ROUND), 120, f"the request of round {ROUND}")
        yield Running(sandbox, order, worker, [*clients, server])
    finally:
        os.kill(worker, signal.SIGCONT)


def same(ours: dict[str, Any], expected: dict[str, Any]) -> bool:
    return set(ours) == set(expected) and all(ours[name].equal(expected[name]) for name in expected)


def test_a_site_misses_the_deadline_of_one_round(
    sandbox: Sandbox, wait_for: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sandbox.folder / "data"
    make_data(data)
    settings = {**SETTINGS, "dataset": str(data), "rounds": 3, "round-timeout": DEADLINE_S}
    with monkeypatch.context() as patched:
        patched.setattr(inprocess, "InProcessGrid", WithoutOne)
        expected = simulated(sandbox.folder / "reference", settings, clients=3)
    with stopped(sandbox, wait_for, data, SITES, settings) as running:
        wait_for(lambda: rounds(sandbox) >= ROUND, 3 * DEADLINE_S, f"round {ROUND}")
    adapter, rows, events = running.end()
    assert same(adapter, expected)
    merged = {(row["client"], row["round"]) for row in rows if "refused" not in row}
    assert merged == {(site, number) for site in SITES for number in (1, 2, 3)} - {(SITE, ROUND)}
    missed, late = sorted((row for row in rows if "refused" in row), key=lambda row: row["round"])
    assert (missed["client"], missed["round"]) == (SITE, ROUND)
    assert f"no reply within {DEADLINE_S:g} s (round-timeout)" in missed["refused"]
    # Its reply came all the same, in the next round, and was not taken for one of that.
    assert (late["client"], late["round"], late["trained_for"]) == (SITE, ROUND + 1, ROUND)
    assert "late" in late["refused"]
    refused = [event["details"] for event in events if event["kind"] == "update refused"]
    assert [(each["site"], each["round"], each["reason"]) for each in refused] == [
        (row["client"], row["round"], row["refused"]) for row in (missed, late)
    ]


def test_a_process_that_dies_with_its_message_is_asked_again(sandbox: Sandbox, wait_for: Wait) -> None:
    """Not the SuperNode, which goes on and tells, once it has missed the process's heartbeats."""
    data, sites = sandbox.folder / "data", SITES[:2]
    make_data(data, sites)
    settings = {**SETTINGS, "dataset": str(data), "rounds": 2}
    expected = simulated(sandbox.folder / "reference", settings, clients=2)
    home = f"FLWR_HOME={sandbox.folder / SITE / 'state' / 'flwr'}"

    def at_work() -> list[int]:
        command = {pid: Path(f"/proc/{pid}/cmdline") for pid in processes_of(home)}
        return [pid for pid, line in command.items() if b"flwr-clientapp" in line.read_bytes()]

    with stopped(sandbox, wait_for, data, sites, settings) as running:
        wait_for(lambda: bool(at_work()), 60, "the process of the message")
        time.sleep(SETTLED_S)
        (process,) = at_work()
        kill(process)
    adapter, rows, events = running.end()
    assert same(adapter, expected)
    assert {(row["client"], row["round"]) for row in rows} == {(s, n) for s in sites for n in (1, 2)}
    assert not any("refused" in row for row in rows)
    again = [(row["client"], row["round"]) for row in rows if row.get("asked_again") == 1]
    assert again == [(SITE, ROUND)]
    told = [event["details"] for event in events if event["kind"] == "asked again"]
    assert [(each["site"], each["round"], each["reason"]) for each in told] == [
        (SITE, ROUND, "its process died")
    ]
