"""The server works on unlearning jobs by itself: in turn with runs, again after a crash, and only with their owners."""

from __future__ import annotations

import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from federation_maker import Made, make_federation
from test_orders import begin, dead_pid
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.deploy import node as module
from fednano.deploy.client import node_config
from fednano.deploy.jobs import Listed, listed
from fednano.deploy.node import require_up
from fednano.deploy.orders import JOBS, Order, Orders
from fednano.deploy.status import gather, lines
from fednano.errors import ConfigError, DataError, RunError
from fednano.federation.config import OTHER_WORK, UNPROTECTED, RunConfig
from fednano.runs import RunFolder
from fednano.runs.atomic import write_json
from fednano.security.keys import create_key
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.states import State
from fednano.unlearning.live import ENDED, ENDED_EARLY

A, B = "site-a", "site-b"
QUEUED = (State.VALIDATED, State.APPROVED, State.QUEUED)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_federation(tmp_path / "federation", A, B)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings that were handed to Flower, whose command is a double."""
    seen: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(tomllib.loads(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", run)
    return seen


def finished(made: Made, **settings: Any) -> RunFolder:
    """A run that has ended."""
    folder = RunFolder.create(
        made.place.root / "runs", "tuned", RunConfig.from_mapping(settings).to_mapping()
    )
    folder.write_json("adapter.json", {})
    folder.write_json("summary.json", {})
    return folder


def job(folder: RunFolder, site: str = A, *, way: tuple[State, ...] = QUEUED) -> str:
    """A job of a site, carried to where ``way`` leads."""
    store = Place(folder).store
    number = str(len(store.jobs()))
    made, _ = store.add(number, {"request": {"nonce": number, "site": site}}, actor="test")
    for state in way:
        store.move([made.id], state, actor="test", batch=made.id)
    return made.id


def end(made: Made, folder: RunFolder, text: str = ENDED) -> None:
    """What the app does last."""
    folder.append_event("info", text)
    made.place.deactivate(folder.id)


def at_work(made: Made, folder: RunFolder, pid: int | None = None) -> None:
    """What the app does first."""
    made.place.activate(folder.id)
    if pid is not None:
        (made.place.root / "active" / folder.id).write_text(str(pid))


def only(orders: Orders) -> Order:
    (order,) = orders.all()
    return order


def test_a_queued_job_is_worked_on_without_being_ordered(made: Made, started: list[dict[str, Any]]) -> None:
    folder, orders = finished(made, **{"round-timeout": 77.0}), Orders(made.place)
    assert orders.tend({}, fresh=False, connected=[A, B]) is None
    name = job(folder)
    orders.tend({}, fresh=False, connected=[A, B])
    (settings,) = started
    assert settings.pop(OTHER_WORK) == str(folder.path)
    assert settings.pop(UNPROTECTED) is False
    config = RunConfig.from_mapping(settings)
    assert (config.server_dir, config.round_timeout) == (str(made.place.root), 77.0)
    at_work(made, folder)
    Place(folder).store.move([name], State.RUNNING, actor="worker", batch=name)
    Place(folder).store.add_round(name, 2, {"number": 2, "of": 5})
    running = orders.tend({}, fresh=False, connected=[A, B])
    assert running is not None
    assert (running.kind, running.state, running.run) == (JOBS, "running", folder.id)

    write_json(
        made.place.root / "state" / "status.json",
        {
            "pid": module.os.getpid(),
            "federation": "hospitals",
            "processes": [],
            "sites": [],
            "order": vars(running),
        },
    )
    shown = gather(made.place.root, site=False)
    (row,) = shown["jobs"]
    assert row == vars(Listed(folder.id, name, A, "running", "", "2/5"))
    assert f"  job {name} of {folder.id} ({A}): running, round 2/5" in lines(shown)
    assert f"  order {running.id}: unlearning jobs of {folder.id}, running" in lines(shown)

    for state in (State.VERIFYING, State.COMMITTED):
        Place(folder).store.move([name], state, actor="worker")
    end(made, folder)
    orders.tend({}, fresh=False, connected=[A, B])
    assert only(orders).state == "done"
    for _ in range(3):
        assert orders.tend({}, fresh=False, connected=[A, B]) is None
    assert len(started) == 1


@pytest.mark.parametrize("how", ["process", "superlink", "server"])
def test_a_killed_worker_is_started_again(made: Made, started: list[dict[str, Any]], how: str) -> None:
    folder, orders = finished(made), Orders(made.place)
    name = job(folder)
    orders.tend({}, fresh=False, connected=[A])
    at_work(made, folder, dead_pid() if how == "process" else None)
    Place(folder).store.move([name], State.RUNNING, actor="worker", batch=name)
    again = Orders(made.place) if how == "server" else orders
    again.tend({}, fresh=how != "process", connected=[A])
    assert [each[OTHER_WORK] for each in started] == [str(folder.path)] * 2
    assert (only(again).state, only(again).attempts) == ("running", 2)
    assert not made.place.is_active(folder.id)  # until its process is there again


def test_jobs_wait_for_their_owner_and_let_others_go_first(made: Made, started: list[dict[str, Any]]) -> None:
    folder, orders = finished(made), Orders(made.place)
    job(folder)
    waiting = orders.tend({}, fresh=False, connected=[B])
    assert waiting is not None
    assert waiting.note == f"waits for {A} to connect"
    run = orders.submit({"rounds": 3})
    orders.tend({}, fresh=False, connected=[B])
    assert [each.get("rounds") for each in started] == [3]
    # Once the run is under way, jobs wait for its end, and so does whatever comes after them.
    later = orders.submit({"rounds": 4})
    orders.tend({}, fresh=False, connected=[A, B])
    assert len(started) == 1
    orders.save(replace(orders.get(run.id), state="done"))
    for _ in range(2):
        orders.tend({}, fresh=False, connected=[A, B])
        at_work(made, folder)
    assert [OTHER_WORK in each for each in started] == [False, True]
    # The owner leaves in the middle: its job is handed back, the next in the queue has its turn.
    end(made, folder)
    orders.tend({}, fresh=False, connected=[B])
    orders.tend({}, fresh=False, connected=[B])
    assert started[-1]["rounds"] == 4
    assert orders.get(later.id).state == "running"


@pytest.mark.parametrize(
    "way", [(), QUEUED[:2], (*QUEUED, State.RUNNING), (*QUEUED, State.RUNNING, State.VERIFYING)]
)
def test_what_a_killed_process_left_behind_is_carried_on(
    made: Made, started: list[dict[str, Any]], way: tuple[State, ...]
) -> None:
    job(finished(made), way=way)
    Orders(made.place).tend({}, fresh=True, connected=[A])
    assert len(started) == 1


@pytest.mark.parametrize("way", [QUEUED[:1], (State.REJECTED,), (*QUEUED, State.CANCELLED)])
def test_jobs_that_nobody_can_carry_on_are_left_alone(
    made: Made, started: list[dict[str, Any]], way: tuple[State, ...]
) -> None:
    job(finished(made), way=way)
    assert Orders(made.place).tend({}, fresh=True, connected=[A]) is None
    assert started == []


def test_jobs_of_a_run_that_trains_wait_for_its_end(made: Made, started: list[dict[str, Any]]) -> None:
    orders = Orders(made.place)
    orders.submit({})
    orders.tend({}, fresh=False, connected=[A, B])
    folder = begin(made, orders, module.os.getpid())
    job(folder)
    for _ in range(2):
        orders.tend({}, fresh=False, connected=[A, B])
    assert len(started) == len(orders.all()) == 1


def test_an_error_is_tried_again_later_and_given_up_in_the_end(
    made: Made, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, orders = finished(made), Orders(made.place)
    first = job(folder)
    moment = 1e9
    monkeypatch.setattr("fednano.deploy.orders.time.time", lambda: moment)
    waits = []
    for number in range(1, 11):
        orders.tend({}, fresh=False, connected=[A])
        assert len(started) == number
        end(made, folder, f"{ENDED_EARLY}the disk is full")
        orders.tend({}, fresh=False, connected=[A])
        orders.tend({}, fresh=False, connected=[A])  # not before its time
        assert len(started) == number
        waits.append(only(orders).after - moment)
        moment += 1800.0
    assert waits[:3] == [30.0, 60.0, 120.0]
    assert max(waits[:9]) == 1800.0
    failed = only(orders)
    assert (failed.state, failed.jobs) == ("failed", (first,))
    assert "given up after 10 times: the disk is full" in failed.note
    orders.tend({}, fresh=False, connected=[A])
    assert len(orders.all()) == 1
    job(folder)  # a new one is worked on, with the old
    orders.tend({}, fresh=False, connected=[A])
    assert [order.state for order in orders.all()] == ["failed", "running"]


def test_protected_runs_need_the_operators_word(made: Made, started: list[dict[str, Any]]) -> None:
    folder, orders = finished(made, **{"secure-aggregation": True, "rule": "fedavg"}), Orders(made.place)
    job(folder)
    orders.tend({}, fresh=False, connected=[A])
    assert only(orders).state == "failed"
    assert "--allow-unprotected" in only(orders).note
    orders.tend({}, fresh=False, connected=[A])
    assert started == []
    with pytest.raises(RunError, match="--allow-unprotected"):
        orders.submit_jobs(folder.id)
    allowed = orders.submit_jobs(folder.id, unprotected=True)
    assert orders.submit_jobs(folder.id, unprotected=True).id == allowed.id
    orders.tend({}, fresh=False, connected=[A])
    assert started[0][UNPROTECTED] is True


def test_an_order_that_waits_starts_at_once_when_it_is_asked_for(
    made: Made, started: list[dict[str, Any]]
) -> None:
    folder, orders = finished(made), Orders(made.place)
    job(folder)
    orders.tend({}, fresh=False, connected=[A])
    end(made, folder, f"{ENDED_EARLY}the host is away")
    orders.tend({}, fresh=False, connected=[A])
    assert (only(orders).state, only(orders).note) == ("waiting", "the host is away")
    orders.submit_jobs(folder.id)
    orders.tend({}, fresh=False, connected=[A])
    assert len(started) == 2


def test_a_damaged_store_is_named(made: Made) -> None:
    folder = finished(made)
    job(folder)
    store = folder.path / "unlearning" / "jobs.sqlite"
    for path in store.parent.glob("jobs.sqlite*"):
        path.unlink()
    store.write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match=r"jobs\.sqlite cannot be read"):
        listed(made.place.root / "runs")


def test_nobody_waits_for_a_server_that_is_not_up(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STARTING_S", -1.0)
    with pytest.raises(ConfigError, match="the order is kept, but no server is up"):
        next(require_up(made.place.root))


def test_the_command_line_says_whose_run_it_is_not(made: Made, tmp_path: Path) -> None:
    other = make_federation(tmp_path / "other", A)
    folder = finished(other)
    words = ["unlearn", "run", "--server", str(made.place.root), "--run", str(folder.path)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError)
    assert "is no run of this server" in str(done.exception)
    done = CliRunner().invoke(app, [*words, "--superlink", "here"])
    assert "--server or --superlink, not both" in str(done.exception)


def test_a_sites_own_key_in_its_bundle_is_used(made: Made) -> None:
    bundle = made.bundle(A)
    facts = bundle.facts | {"node_config": {"partition-id": 0, "num-partitions": 2}}
    write_json(bundle.root / "site.json", facts)
    assert "key=" not in node_config(bundle)
    create_key(bundle.root / "keys", A)
    assert f'key="{bundle.root / "keys" / A}.key"' in node_config(bundle)


def test_orders_of_earlier_versions_are_read(made: Made) -> None:
    orders = Orders(made.place)
    order = orders.submit({})
    write_json(
        orders.folder / f"{order.id}.json",
        {
            name: value
            for name, value in vars(order).items()
            if name not in ("kind", "jobs", "after", "events")
        },
    )
    assert orders.get(order.id) == order
