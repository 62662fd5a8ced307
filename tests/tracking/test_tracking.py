"""Trackers: what they are told, and that none can hurt a run."""

from __future__ import annotations

import re
import sys
import types
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fednano.errors import ConfigError
from fednano.federation.config import RunConfig
from fednano.federation.simulation import simulate
from fednano.federation.worker import Worker
from fednano.runs import QuietView, RunFolder, RunInfo, make_view
from fednano.tracking import TrackedView, Tracker, check_names, make_trackers

INFO = {"model": "tiny", "dataset": "easy-vqa", "adapter": "nano", "rule": "fedavg", "clients": 2}


def info(path: Path) -> RunInfo:
    return RunInfo(run_id="r1", path=path, **INFO)  # type: ignore[arg-type]


def play(view: TrackedView, path: Path, *, error: str | None = None) -> None:
    """Two rounds, as the round loop tells them."""
    view.start(info(path))
    view.evaluation("zero-shot", 0, accuracy=0.25, loss=2.0)
    view.phase_started("federated", 2)
    for number in (1, 2):
        view.round_started(number, ["a", "b"])
        view.client_done("a", loss=1.0 / number, samples=8, seconds=0.5, bytes={"adapter_up": 10})
        view.client_done("b", refused="not finite")
        view.round_done(number, loss=1.0 / number, seconds=2.0, bytes={"adapter_up": 10, "adapter_down": 20})
        view.evaluation("federated", number, accuracy=0.5, loss=float("nan"))
    view.finish(error=error)
    view.finish(error=error)


class Recorder:
    """A tracker of one's own."""

    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.calls: list[Any] = []
        Recorder.made.append(self)

    def start(self, info: RunInfo, settings: Mapping[str, bool | int | float | str]) -> None:
        self.calls.append(("start", info.run_id, dict(settings)))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self.calls.append((step, dict(values)))

    def finish(self, status: str) -> None:
        self.calls.append(("finish", status))


def test_what_a_tracker_is_told(tmp_path: Path) -> None:
    own: Tracker = Recorder()
    play(TrackedView(QuietView(), [("own", own)], {"rounds": 2}), tmp_path)
    calls = own.calls  # type: ignore[attr-defined]
    assert calls[0] == ("start", "r1", {"rounds": 2})
    assert calls[1] == (0, {"zero-shot/score": 0.25, "zero-shot/test_loss": 2.0})
    assert calls[2] == (
        1,
        {
            "federated/clients/a/loss": 1.0,
            "federated/clients/a/samples": 8.0,
            "federated/clients/a/seconds": 0.5,
        },
    )
    assert calls[3][1]["federated/refused"] == 1
    assert calls[3][1]["federated/bytes/adapter_down"] == 20
    assert calls[4] == (1, {"federated/score": 0.5})  # a loss that is not a number is none
    assert calls[-1] == ("finish", "complete")
    assert len([call for call in calls if call[0] == "finish"]) == 1


def test_a_tracker_that_fails_is_left_out_and_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(Recorder):
        def log(self, values: Mapping[str, float], *, step: int) -> None:
            raise ConnectionError("the server is away")

    other, failing = Recorder(), Failing()
    play(
        TrackedView(QuietView(), [("bad", failing), ("good", other)], {}), tmp_path, error="the disk is full"
    )
    said = capsys.readouterr().err
    assert said.count("bad is left out from here on: ConnectionError: the server is away") == 1
    assert failing.calls == [("start", "r1", {})]
    assert other.calls[-1] == ("finish", "failed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorbord", "track is 'tensorbord'; expected tensorboard, mlflow"),
        ("mlflow=x", "takes nothing"),
        ("wandb,wandb", "twice"),
        ("prometheus=9465", "expected HOST:PORT"),
        ("no_such_module_here:Class", "cannot be had"),
        ("json:Missing", "cannot be had"),
        ("json:JSONDecoder", "has no start, log, finish"),
        ("functools:partial", "cannot be made without arguments"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trackers(text)


def test_settings_are_checked_where_they_are_read() -> None:
    with pytest.raises(ConfigError, match="track is 'tensorbord'"):
        RunConfig(track="tensorbord")
    check_names("tensorboard, prometheus=127.0.0.1:0,my.module:Class,")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install 'fednano\[{name}\]'"):
        make_trackers(name)


def test_tensorboard_files_are_read_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = make_trackers("tensorboard")
    play(TrackedView(QuietView(), trackers, {"rounds": 2}), tmp_path)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("federated/train_loss")]
    assert losses == [(1, 1.0), (2, 0.5)]
    assert [event.value for event in found.Scalars("zero-shot/score")] == [0.25]
    assert [event.value for event in found.Scalars("federated/bytes/adapter_down")] == [20, 20]
    assert "settings/text_summary" in found.Tags()["tensors"]


def test_mlflow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.ModuleType("mlflow")
    for name in ("start_run", "log_params", "log_metrics", "end_run"):
        setattr(fake, name, lambda *args, _name=name, **more: calls.append((_name, args, more)))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    settings = {f"setting-{n}": n for n in range(150)}
    play(TrackedView(QuietView(), make_trackers("mlflow"), settings), tmp_path)
    assert calls[0] == ("start_run", (), {"run_name": "r1"})
    params = [args[0] for name, args, _ in calls if name == "log_params"]
    assert max(map(len, params)) <= 100
    assert {k: v for part in params for k, v in part.items()} == settings
    assert ("log_metrics", ({"federated/score": 0.5},), {"step": 2}) in calls
    assert calls[-1] == ("end_run", (), {"status": "FINISHED"})


def test_wandb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        summary: dict[str, str] = {}  # noqa: RUF012

        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append((name, step_metric))

        def log(self, values: dict[str, float]) -> None:
            calls.append(values)

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    fake = types.ModuleType("wandb")
    fake.init = lambda **more: calls.append(more) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    play(TrackedView(QuietView(), make_trackers("wandb"), {"rounds": 2}), tmp_path, error="no")
    assert calls[0] == {"name": "r1", "config": {"rounds": 2}, "dir": str(tmp_path)}
    assert calls.count(("federated/*", "federated/round")) == 1
    assert {"federated/round": 2, "federated/score": 0.5} in calls
    assert Run.summary == {"status": "failed"}
    assert calls[-1] == 1


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        return str(reply.read().decode())


def test_prometheus_serves_the_newest_numbers(tmp_path: Path) -> None:
    [(_, tracker)] = make_trackers("prometheus=127.0.0.1:0")
    view = TrackedView(QuietView(), [("prometheus", tracker)], {})
    view.start(info(tmp_path))
    address = tracker.address  # type: ignore[attr-defined]
    try:
        view.phase_started("federated", 2)
        for number in (1, 2):
            view.round_started(number, ["a"])
            view.client_done("a", loss=0.5 / number)
            view.round_done(number, loss=1.0 / number, bytes={"adapter_up": 10})
        text = scrape(address)
        for line in (
            'fednano_run_info{adapter="nano",dataset="easy-vqa",model="tiny",rule="fedavg",run="r1"} 1.0',
            'fednano_run_round{phase="federated"} 2.0',
            'fednano_run_train_loss{phase="federated"} 0.5',
            'fednano_run_client_loss{client="a",phase="federated"} 0.25',
            'fednano_run_bytes_total{phase="federated",plane="adapter_up"} 20.0',
        ):
            assert line in text
        [(_, second)] = make_trackers(f"prometheus={address}")
        with pytest.raises(ConfigError, match="cannot listen at"):
            second.start(info(tmp_path), {})
    finally:
        view.finish()
    with pytest.raises(OSError, match="refused"):
        scrape(address)


def test_a_run_tells_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the setting to the tracker, through a whole run: its numbers are those of metrics.jsonl."""
    module = types.ModuleType("own_trackers_of_test")
    module.Recorder = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_trackers_of_test", module)
    Recorder.made.clear()
    config = RunConfig(
        track="own_trackers_of_test:Recorder", placement="local", streams="text", rank=2, clients=2, rounds=1,
        samples=4, batch_size=4, evaluate_samples=4, final_samples=4, holdout=0.0, runs_dir=str(tmp_path),
    )  # fmt: skip
    try:
        path = simulate(config, backend="inprocess", view=make_view("quiet"))
    finally:
        Worker.close_current()
    [own] = Recorder.made
    assert own.calls[0][2]["rank"] == 2
    assert own.calls[0][2]["rule"] == "fedavg"  # settled, not 'auto'
    assert own.calls[-1] == ("finish", "complete")
    rows = RunFolder(path).metrics()
    merged = next(row for row in rows if row["round"] == 1 and row["scope"] == "global")
    [told] = [values for step, values in own.calls[1:-1] if "federated/train_loss" in values]
    assert told["federated/train_loss"] == merged["train_loss"]
    assert {f"federated/bytes/{k}": v for k, v in merged["bytes"].items()}.items() <= told.items()
    command = RunFolder(path).config()["command"]
    assert not re.search("--track", command)
