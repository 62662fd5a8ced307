"""Orders outlive crashes: started, noticed, resumed, and given up with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from federation_maker import Made, make_federation

from fednano.deploy import node as module
from fednano.deploy.orders import Order, Orders
from fednano.deploy.supervise import alive
from fednano.errors import ConfigError, RunError
from fednano.federation.config import RunConfig
from fednano.runs import RunFolder


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_federation(tmp_path / "federation", "site-a", "site-b")


@pytest.fixture
def started(made: Made, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings of the runs that were handed to Flower, whose command is a double."""
    seen: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        import tomllib

        assert command[1:2] == ["run"]
        seen.append(tomllib.loads(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return seen


def begin(made: Made, orders: Orders, pid: int, checkpoint: bool = False) -> RunFolder:
    """What the run's own process does first."""
    folder = RunFolder.create(orders.runs, "run", {"rounds": 3})
    made.place.activate(folder.id)
    (made.place.root / "active" / folder.id).write_text(str(pid))
    if checkpoint:
        (folder.path / "checkpoints" / "round-0001").mkdir(parents=True)
    return folder


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def current(orders: Orders) -> Order:
    found = orders.current()
    assert found is not None
    return found


def test_a_run_is_handed_over_with_the_servers_settings(made: Made, started: list[dict[str, Any]]) -> None:
    orders = Orders(made.place)
    order = orders.submit({"rounds": 3, "learning-rate": 0.5})
    orders.tend({}, fresh=False)
    (settings,) = started
    assert settings["clients"] == 2
    assert settings["server-dir"] == str(made.place.root)
    RunConfig.from_mapping(settings)
    assert orders.get(order.id).state == "running"
    folder = begin(made, orders, os.getpid())
    for _ in range(3):
        orders.tend({}, fresh=False)
    assert current(orders).run == folder.id
    (folder.path / "summary.json").write_text("{}")
    made.place.deactivate(folder.id)
    orders.tend({}, fresh=False)
    assert orders.get(order.id).state == "done"
    assert orders.current() is None
    assert len(started) == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not tell")
def test_a_killed_process_that_nobody_has_waited_for_counts_as_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert alive(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(process.pid)
    process.communicate()
    assert not alive(process.pid)


@pytest.mark.parametrize("how", ["process", "superlink"])
def test_a_killed_run_is_resumed_from_its_checkpoint(
    made: Made, started: list[dict[str, Any]], how: str
) -> None:
    orders = Orders(made.place)
    orders.submit({"rounds": 3})
    cleared: list[int] = []
    orders.tend({}, fresh=False, clear=lambda: cleared.append(len(started)))
    folder = begin(made, orders, dead_pid() if how == "process" else os.getpid(), checkpoint=True)
    orders.tend({}, fresh=how == "superlink", clear=lambda: cleared.append(len(started)))
    assert cleared == [0, 1]  # what Flower takes to be under way is ended before something new begins
    assert [each["resume"] for each in started] == ["", folder.id]
    assert not made.place.is_active(folder.id)  # until its process is there again


def test_a_run_killed_before_its_first_checkpoint_starts_anew(
    made: Made, started: list[dict[str, Any]]
) -> None:
    orders = Orders(made.place)
    orders.submit({})
    orders.tend({}, fresh=False)
    begin(made, orders, dead_pid())
    orders.tend({}, fresh=False)
    assert [each["resume"] for each in started] == ["", ""]
    assert current(orders).run == ""


def test_a_run_that_ended_with_an_error_is_not_repeated(made: Made, started: list[dict[str, Any]]) -> None:
    orders = Orders(made.place)
    order = orders.submit({})
    orders.tend({}, fresh=False)
    folder = begin(made, orders, os.getpid())
    folder.append_event("error", "no client delivered a valid update")
    folder.close()
    made.place.deactivate(folder.id)
    orders.tend({}, fresh=False)
    done = orders.get(order.id)
    assert (done.state, done.note) == ("failed", "no client delivered a valid update")
    assert len(started) == 1


def test_a_run_that_has_worked_is_tried_again_after_an_error(
    made: Made, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, moment = Orders(made.place), time.time()
    monkeypatch.setattr("fednano.deploy.orders.time.time", lambda: moment)
    order = orders.submit({})
    orders.tend({}, fresh=False)
    folder = begin(made, orders, os.getpid(), checkpoint=True)

    def fail() -> None:
        nonlocal moment
        folder.append_event("error", "client site-b cannot take part: no reply")
        made.place.deactivate(folder.id)
        orders.tend({}, fresh=False)
        waiting = orders.get(order.id)
        if waiting.state == "waiting":
            orders.tend({}, fresh=False)
            assert orders.get(order.id) == waiting  # not at once
            moment += 10_000.0
            orders.tend({}, fresh=False)

    for tries in range(1, 4):
        fail()
        assert len(started) == 1 + tries
    # With a round in between, the tries are counted anew.
    (folder.path / "checkpoints" / "round-0002").mkdir()
    for tries in range(4, 8):
        fail()
        assert len(started) == 1 + tries
    fail()
    failed = orders.get(order.id)
    assert (failed.state, len(started)) == ("failed", 8)
    assert "given up after 4 times: client site-b cannot take part" in failed.note
    assert {each["resume"] for each in started[1:]} == {folder.id}


def test_what_always_dies_is_given_up(made: Made, started: list[dict[str, Any]]) -> None:
    orders = Orders(made.place)
    order = orders.submit({})
    for _ in range(12):
        orders.tend({}, fresh=True)
    assert orders.get(order.id).state == "failed"
    assert len(started) == 10


def test_orders_are_worked_on_in_turn_and_outlive_the_server(
    made: Made, started: list[dict[str, Any]]
) -> None:
    first, second = (Orders(made.place).submit({"seed": seed}) for seed in (1, 2))
    orders = Orders(made.place)
    assert [order.id for order in orders.all()] == [first.id, second.id]
    orders.tend({}, fresh=False)
    orders.save(replace(orders.get(first.id), state="done"))
    orders.tend({}, fresh=False)
    assert [each["seed"] for each in started] == [1, 2]
    with pytest.raises(RunError, match="there is no order 'x'"):
        orders.get("x")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host-address": "h:1"}, "host-address is the server's own affair"),
        ({"runs-dir": "x"}, "runs-dir is the server's own affair"),
        ({"placement": "local"}, "is 'split' and without baselines"),
        ({"baselines": True}, "is 'split' and without baselines"),
        ({"model": "other"}, "the language host serves 'tiny'"),
        ({"rounds": 0}, "rounds is 0; expected at least 1"),
    ],
)
def test_a_wrong_order_is_refused(made: Made, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Orders(made.place).submit(settings)
    assert Orders(made.place).all() == []


def test_flowers_refusal_is_kept(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess(["flwr"], 1, "", "Error: no SuperLink there\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: done)
    orders = Orders(made.place)
    orders.submit({})
    orders.tend({}, fresh=False)
    assert (current(orders).state, current(orders).note) == ("waiting", "Error: no SuperLink there")
    assert json.loads(json.dumps(current(orders).settings))["clients"] == 2


def test_a_simulation_does_not_run_on_a_servers_folder(made: Made) -> None:
    from fednano.federation.simulation import simulate

    with pytest.raises(ConfigError, match="not enrolled there"):
        simulate(RunConfig(server_dir=str(made.place.root)))
