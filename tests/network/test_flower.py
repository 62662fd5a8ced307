"""The same app on real processes: Flower's simulation engine, `flwr run`, SuperLink and SuperNodes; and their ends.

Starting processes is what takes the time here, so each test shows several things, and the work itself is small.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Sandbox, free_port
from safetensors.torch import load_file

pytestmark = [pytest.mark.network, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
SMALL = {
    "clients": 2,
    "rounds": 2,
    "samples": 32,
    "alpha": 5.0,
    "evaluate-samples": 16,
    "final-samples": 32,
    "rank": 4,
    "rule": "fisher",
    "fisher-samples": 8,
}


def as_run_config(**settings: Any) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def as_options(**settings: Any) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def only_run(folder: Path) -> Path:
    runs = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    assert len(runs) == 1, runs
    return runs[0]


def check(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert summary["clients"] == 2
    assert (path / "report.html").stat().st_size > 10_000
    assert summary["bytes"]["activation_up_per_sample_step"] > 0
    return summary


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The adapter of the same run in one process: what every other way must reproduce to the bit."""
    sandbox = Sandbox(tmp_path_factory.mktemp("reference"))
    options = [*as_options(**SMALL), "--runs-dir", str(sandbox.folder / "ref")]
    done = sandbox.run("fednano", "simulate", "--backend", "inprocess", "--json", *options)
    path = only_run(sandbox.folder / "ref")
    assert json.loads(done.stdout) == check(path)
    yield path
    sandbox.close()


def assert_same_adapter(path: Path, reference: Path, name: str = "adapter.safetensors") -> None:
    ours, theirs = (load_file(p / name) for p in (path, reference))
    assert set(ours) == set(theirs)
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_flower_simulation_command_gives_the_same_bits_and_leaves_no_process(
    sandbox: Any, reference: Path
) -> None:
    settings = {key: value for key, value in SMALL.items() if key != "clients"}
    sandbox.run(
        "flower-simulation",
        "--app",
        str(ROOT),
        "--num-supernodes",
        "2",
        "--run-config",
        as_run_config(**settings, **{"runs-dir": str(sandbox.folder / "old")}),
    )
    path = only_run(sandbox.folder / "old")
    check(path)
    assert_same_adapter(path, reference)
    deadline = time.monotonic() + 30  # Ray's processes end in their own time
    while sandbox.leftovers() and time.monotonic() < deadline:
        time.sleep(1)
    assert not sandbox.leftovers()


def test_flwr_run_on_a_local_superlink(sandbox: Any, reference: Path) -> None:
    done = sandbox.run(
        "flwr",
        "run",
        str(ROOT),
        "--stream",
        "--federation-config",
        "num-supernodes=2 client-resources-num-cpus=1",
        "--run-config",
        as_run_config(**SMALL, **{"runs-dir": str(sandbox.folder / "flwr-runs")}),
    )
    assert "evaluation (Federated, round 2)" in done.stdout + done.stderr
    path = only_run(sandbox.folder / "flwr-runs")
    check(path)
    assert_same_adapter(path, reference)


def test_superlink_and_two_supernodes(
    sandbox: Any, reference: Path, wait_for: Callable[[Callable[[], bool], float, str], None]
) -> None:
    port = free_port()
    sandbox.start(
        "flower-superlink",
        "--insecure",
        "--disable-runtime-dependency-installation",
        "--port",
        str(port),
        name="superlink",
    )
    for number in range(2):
        sandbox.start(
            "flower-supernode",
            "--insecure",
            "--superlink",
            f"127.0.0.1:{port}",
            "--port",
            str(free_port()),
            "--node-config",
            f"partition-id={number} num-partitions=2",
            name=f"supernode-{number}",
        )
    (sandbox.folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    log = sandbox.folder / "superlink.log"
    wait_for(lambda: "Uvicorn running" in log.read_text(), 120, "the SuperLink")
    settings = SMALL | {"runs-dir": str(sandbox.folder / "deployed")}
    sandbox.run(
        "flwr", "run", str(ROOT), "here", "--stream", "--run-config", as_run_config(**settings), timeout=1000
    )
    path = only_run(sandbox.folder / "deployed")
    check(path)
    assert_same_adapter(path, reference)
    # Under secure aggregation, each of whose four exchanges is a process of its own: the server merges the same bits.
    settings |= {"runs-dir": str(sandbox.folder / "secure"), "secure-aggregation": True, "rounds": 1}
    sandbox.run(
        "flwr", "run", str(ROOT), "here", "--stream", "--run-config", as_run_config(**settings), timeout=1000
    )
    path = only_run(sandbox.folder / "secure")
    assert_same_adapter(path, reference, "checkpoints/round-0001/adapter.safetensors")
    assert "secure aggregation of 2 clients" in (path / "events.jsonl").read_text()


def test_a_ray_simulation_ends_cleanly_on_ctrl_c_with_the_same_bits_so_far(
    sandbox: Any, reference: Path, wait_for: Callable[[Callable[[], bool], float, str], None]
) -> None:
    settings = SMALL | {"rounds": 200}
    process = sandbox.start(
        "fednano", "simulate", *as_options(**settings), "--runs-dir", str(sandbox.folder / "runs"), name="run"
    )
    log = sandbox.folder / "run.log"
    wait_for(lambda: "round 2/200 merged" in log.read_text(), 400, "two rounds")
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(180) == 130
    assert "interrupted by Ctrl-C" in log.read_text()
    assert "--resume" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert_same_adapter(
        only_run(sandbox.folder / "runs"), reference, "checkpoints/round-0002/adapter.safetensors"
    )
    wait_for(lambda: not sandbox.leftovers(), 60, "the processes to end")


def test_a_host_that_dies_ends_the_run_with_its_checkpoint(
    sandbox: Any, wait_for: Callable[[Callable[[], bool], float, str], None]
) -> None:
    settings = SMALL | {"rounds": 200, "host-retry": 2.0}
    process = sandbox.start(
        "fednano",
        "simulate",
        "--backend",
        "inprocess",
        *as_options(**settings),
        "--runs-dir",
        str(sandbox.folder / "runs"),
        name="run",
    )
    log = sandbox.folder / "run.log"
    wait_for(lambda: "round 2/200 merged" in log.read_text(), 400, "two rounds")
    hosts = subprocess.run(
        ["pgrep", "-f", "fednano[.]host"], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = [int(pid) for pid in hosts if int(pid) in sandbox.leftovers()]
    assert len(ours) == 1
    os.kill(ours[0], signal.SIGKILL)
    assert process.wait(240) == 3
    text = log.read_text()
    assert "host" in text
    assert "--resume" in text
    assert "Traceback" not in text
    assert (only_run(sandbox.folder / "runs") / "checkpoints" / "round-0002").is_dir()
    wait_for(lambda: not sandbox.leftovers(), 60, "the processes to end")
