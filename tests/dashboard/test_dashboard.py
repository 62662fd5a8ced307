"""The dashboard's data and its server, without a browser."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from starlette.types import ASGIApp, Message, Scope
from watched_runs import CLIENTS, ROUNDS, client_row, round_rows, served, write_run

from fednano.board import dashboard
from fednano.board.app import make_app
from fednano.board.load import HostLoad
from fednano.board.logs import Tail
from fednano.board.observer import Observer
from fednano.errors import ConfigError
from fednano.runs import RunFolder
from fednano.runs.report_metrics import read_metrics


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(app: ASGIApp, path: str, *, method: str = "GET", host: str = "127.0.0.1:8642") -> Reply:
    """One request as the server hands it on: no client tidies the path before."""
    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": unquote(path), "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"host", host.encode())], "server": ("127.0.0.1", 8642), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    headers = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], headers, b"".join(each.get("body", b"") for each in sent[1:]))


def look(root: Path, run: str = "") -> dict[str, Any]:
    state = Observer(root).state(run)[1]
    assert state is not None
    return state


def test_a_run_is_told_as_its_files_have_it(runs: Path) -> None:
    state = look(runs)
    run = state["run"]
    assert [each["id"] for each in state["runs"]] == [run["id"]]
    assert (run["round"], run["total"], run["status"]) == (ROUNDS, ROUNDS, "running")
    assert run["scores"] == pytest.approx({"zero_shot": 0.4, "federated": 0.9})
    assert [each["name"] for each in run["clients"]] == [f"client-{k}" for k in range(CLIENTS)]
    assert run["problems"] == []
    rows = RunFolder(runs / run["id"]).metrics()
    sums: dict[str, int] = {}
    for each in run["rounds"]:
        for plane, count in each["bytes"].items():
            sums[plane] = sums.get(plane, 0) + count
    assert sums == read_metrics(rows).planes["federated"] == run["planes"]
    assert run["rounds"][1]["low"] == 0.5
    assert run["rounds"][1]["high"] == pytest.approx(0.7)
    assert run["rounds"][1]["clients"] == CLIENTS


def test_no_folder_an_empty_folder_and_one_that_grows(tmp_path: Path) -> None:
    observer = Observer(tmp_path / "runs")
    version, state = observer.state()
    assert state is not None
    assert (state["exists"], state["runs"], state["run"]) == (False, [], None)
    (tmp_path / "runs").mkdir()
    assert observer.state()[1]["exists"] is True  # type: ignore[index]
    run = write_run(tmp_path / "runs", rounds=1)
    again, state = observer.state(known=version)
    assert state is not None
    assert state["run"]["round"] == 1
    assert observer.state(known=again)[1] is None  # nothing new
    for row in round_rows(2):
        run.append_metrics(row)
    state = observer.state(known=again)[1]
    assert state is not None
    assert state["run"]["round"] == 2
    run.close()


def test_damage_is_named_and_the_rest_is_shown(runs: Path) -> None:
    path = next(runs.glob("*-ward"))
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"phase": "federated", "rou\n\xff\xfe\n[1]\n{"round": 1}\n')
        file.write(json.dumps(client_row(4, 0, bytes={"adapter_up": "many"})).encode() + b"\n")
        file.write(json.dumps(client_row(4, 0, loss=[1])).encode() + b"\n")
        file.write(b'{"phase": "federated", "torn')
    (path / "summary.json").write_text("{")
    (path / "events.jsonl").write_text('{"time": 3, "level": null, "text": "odd"}\n')
    run = look(runs)["run"]
    told = "\n".join(run["problems"])
    assert run["round"] == ROUNDS
    assert "summary.json cannot be read" in told
    assert "line 20 is damaged" in told
    assert "3 records cannot be placed" in told
    json.dumps(run, allow_nan=False)
    (path / "config.json").write_text("[]")
    assert "config.json does not hold an object" in "\n".join(look(runs)["run"]["problems"])


def test_a_line_that_is_being_written_is_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"a": 1}\n{"a"')
    assert tail.read() == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert tail.read() == [{"a": 1}, {"a": 2}]
    assert tail.problems == []
    path.write_text('{"b": 1}\n')  # another file in its place
    assert tail.read() == [{"b": 1}]
    path.write_text('{"c": 1}\n{"c": 2}\n')  # of another length
    assert tail.read() == [{"c": 1}, {"c": 2}]


def test_how_a_run_stands(runs: Path) -> None:
    run = RunFolder.open(root=runs)
    old = 1_700_000_000
    for path in run.path.iterdir():
        os.utime(path, (old, old))
    assert look(runs)["run"]["status"] == "silent"
    run.append_event("error", "the disk is full")
    assert look(runs)["run"]["status"] == "stopped"
    os.utime(run.path / "metrics.jsonl")
    later = {"time": "2024-01-01T00:00:00Z", "level": "error", "text": "the disk is full"}
    (run.path / "events.jsonl").write_text(json.dumps(later) + "\n")
    assert look(runs)["run"]["status"] == "running"  # it was resumed after that
    (run.path / "summary.json").write_text('{"status": "interrupted"}')
    assert look(runs)["run"]["status"] == "interrupted"


def test_unlearning_jobs(runs: Path) -> None:
    folder = next(runs.glob("*-ward")) / "unlearning"
    folder.mkdir()
    with sqlite3.connect(folder / "jobs.sqlite") as database:
        database.execute(
            "CREATE TABLE jobs (id TEXT, site TEXT, state TEXT, created TEXT, updated TEXT, note TEXT)"
        )
        database.execute("INSERT INTO jobs VALUES ('u0001', 'site-a', 'queued', 'c', 'u', '')")
    database.close()
    jobs = look(runs)["run"]["jobs"]
    assert [(job["id"], job["state"]) for job in jobs] == [("u0001", "queued")]
    (folder / "jobs.sqlite").write_bytes(b"not a database, and long enough to be taken for one" * 40)
    assert "jobs.sqlite cannot be read" in "\n".join(look(runs)["run"]["problems"])


class TestServer:
    def test_nothing_but_page_assets_state_and_reports(self, runs: Path, tmp_path: Path) -> None:
        secret = tmp_path / "report.html"
        secret.write_text("secret")
        outside = tmp_path / "outside"
        write_run(outside).close()
        (next(outside.glob("*-ward")) / "report.html").write_text("secret")
        (runs / "link").symlink_to(next(outside.glob("*-ward")), target_is_directory=True)
        own = next(path for path in runs.glob("*-ward") if not path.is_symlink())
        app = make_app(Observer(runs))
        for path in (
            "/runs/../report.html", "/runs/%2e%2e/report.html", "/runs/..%2f..%2fetc/report.html",
            "/runs/link/report.html", "/runs/latest/report.html", f"/runs/{own.name}/config.json",
            f"/runs/{own.name}/../../report.html", "/assets/../app.py", "/assets/%2e%2e%2fapp.py",
            "/assets/index.html", f"/runs/{own.name}/report.html", "/docs",
        ):  # fmt: skip
            reply = ask(app, path)
            assert reply.status == 404, path
            assert b"secret" not in reply.body
            assert "default-src 'none'" in reply.headers["content-security-policy"]
        (own / "report.html").symlink_to(secret)
        assert ask(app, f"/runs/{own.name}/report.html").status == 404
        (own / "report.html").unlink()
        (own / "report.html").write_text("<p>report</p>")
        reply = ask(app, f"/runs/{own.name}/report.html")
        assert reply.body == b"<p>report</p>"
        assert "sandbox" in reply.headers["content-security-policy"]

    def test_headers_and_methods(self, runs: Path) -> None:
        app = make_app(Observer(runs))
        for path in ("/", "/assets/dashboard.js", "/api/state"):
            headers = ask(app, path).headers
            policy = headers["content-security-policy"]
            assert "'unsafe" not in policy
            assert "script-src 'self'" in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert ask(app, path, method="POST").status == 405
        assert ask(app, "/assets/dashboard.js").headers["content-type"].startswith("text/javascript")

    def test_other_names_are_refused(self, runs: Path) -> None:
        app = make_app(Observer(runs), hosts=["127.0.0.1"])
        assert ask(app, "/", host="rebound.example").status == 400
        assert ask(app, "/").status == 200

    def test_the_page_loads_nothing_from_elsewhere(self) -> None:
        from importlib.resources import files

        for asset in (files("fednano.board") / "assets").iterdir():
            text = asset.read_text()
            for word in ("https://", "http://", "//cdn", "innerHTML", "eval(", "@import"):
                assert word not in text.replace("http://www.w3.org/2000/svg", ""), (asset.name, word)

    def test_as_a_command(self, runs: Path) -> None:
        with served(runs) as url:
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(f"{url}api/state", timeout=20) as reply:
                assert json.load(reply)["state"]["run"]["round"] == ROUNDS
            taken = url.rstrip("/").rpartition(":")[2]
            command = [str(Path(sys.executable).with_name("fednano")), "dashboard", "--port", taken]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert f"cannot listen at 127.0.0.1:{taken}" in done.stderr
        assert "--port" in done.stderr
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"port": 70_000}, "port is 70000"),
            ({"bind": "everywhere"}, "bind is 'everywhere'"),
            ({"host_metrics": "127.0.0.1:9464"}, "host-metrics is '127.0.0.1:9464'"),
            ({"host_metrics": "file:///etc/passwd"}, "host-metrics is"),
            ({"runs_dir": __file__}, "which is not a folder"),
        ],
    )
    def test_mistakes(self, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            dashboard(**{"runs_dir": tmp_path, "port": 0, **options})


class TestHostLoad:
    def test_counters(self) -> None:
        registry = CollectorRegistry()
        Gauge("fednano_host_in_flight", "x", registry=registry).set(3)
        Counter("fednano_host_step_tokens", "x", registry=registry).inc(700)
        Counter("fednano_host_refused", "x", ["reason"], registry=registry).labels("quota").inc(2)
        server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/metrics"
            assert HostLoad(url).read() == {
                "values": {"in_flight": 3, "step_tokens": 700},
                "refused": {"quota": 2},
            }
            Gauge("other", "x", registry=(other := CollectorRegistry())).set(1)
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
        assert "cannot be read" in HostLoad(url).read()["error"]
        server, thread = start_http_server(0, addr="127.0.0.1", registry=other)
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/metrics"
            assert "not with the counters" in HostLoad(url).read()["error"]
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def test_one_that_does_not_answer_does_not_stop_the_page(self, runs: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            load = HostLoad(f"http://127.0.0.1:{silent.getsockname()[1]}/metrics")
            reply = json.loads(ask(make_app(Observer(runs), load), "/api/state").body)
        assert "error" in reply["host"]
        assert reply["state"]["run"]["round"] == ROUNDS
