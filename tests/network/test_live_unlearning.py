"""Unlearning through real processes: tuned by SuperNodes, withdrawn by one of them, forgotten through them all."""

from __future__ import annotations

import json
import random
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import free_port
from safetensors.torch import load_file
from typer.testing import CliRunner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]  # some four minutes of CPU time: too long for every change

ROOT = Path(__file__).parents[2]
SITE = "client-001"
SETTINGS = {
    "clients": 2,
    "rounds": 3,
    "samples": 96,
    "batch-size": 8,
    "learning-rate": 0.01,
    "partition": "iid",
    "evaluate-every": 0,
    "final-samples": 8,
    "rank": 8,
    "holdout": 0.1,
}
PLAN = {"--rounds": 4, "--steps": 8, "--rank": 8, "--utility-floor": 0.01}
NAMES = ("ada", "ben", "cora", "dan", "emma", "finn", "gina", "hugo")
CITIES = ("paris", "rome", "oslo", "cairo", "lima", "tokyo", "delhi", "boston")


def as_run_config(**settings: Any) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


@pytest.fixture
def data(sandbox: Any) -> Path:
    """Pictures of things that have made-up names: what is answered of them is memory, and can be forgotten."""
    from fednano.data import load_dataset

    folder = sandbox.folder / "data"
    (folder / "images").mkdir(parents=True)
    draws = random.Random(0)
    for split in ("train", "test"):
        everything, rows = load_dataset("easy-vqa", split), []
        for number in range(24):
            image = everything[number * 97].image
            assert image is not None
            name = f"{split}-{number}.png"
            shutil.copyfile(image, folder / "images" / name)
            answer = f"{draws.choice(NAMES)} {draws.choice(CITIES)}"
            question = "tell me the name and city of the object"
            rows.append(
                {"id": f"{split}/{number:03d}", "image": name, "question": question, "answer": answer}
            )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def superlink(sandbox: Any, wait_for: Any) -> str:
    """SuperLink and two SuperNodes with warm workers; the second one signs with its own key."""
    port = free_port()
    common = ("--insecure", "--superlink", f"127.0.0.1:{port}")
    sandbox.start(
        *("flower-superlink", "--insecure", "--disable-runtime-dependency-installation"),
        *("--port", str(port)),
        name="superlink",
    )
    wait_for(lambda: _answers(port), 300, "the SuperLink")
    key = sandbox.folder / "keys" / f"{SITE}.key"
    for number in range(2):
        door = sandbox.folder / f"worker-{number}.sock"
        sandbox.start(
            *(sys.executable, "-P", "-m", "fednano.federation.warm", "--socket", str(door)),
            name=f"worker-{number}",
        )
        wait_for(door.exists, 300, "the worker")
        node = f'partition-id={number} num-partitions=2 worker="{door}"'
        node += f' key="{key}"' if number else ""
        sandbox.start(
            *("flower-supernode", *common, "--port", str(free_port()), "--node-config", node),
            name=f"supernode-{number}",
        )
    (sandbox.folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    return "here"


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def unlearn(*words: str) -> str:
    """A command of `fednano unlearn` in this process: starting one costs more than what it does."""
    from fednano.cli.commands import app

    done = CliRunner().invoke(app, ["unlearn", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_site_withdraws_samples_from_a_deployment(sandbox: Any, data: Path, superlink: str) -> None:
    runs, keys = sandbox.folder / "runs", str(sandbox.folder / "keys")
    settings = {**SETTINGS, "dataset": str(data)}
    tune = as_run_config(**settings, **{"runs-dir": str(runs)})
    sandbox.run("flwr", "run", str(ROOT), superlink, "--stream", "--run-config", tune)
    (run,) = [path for path in runs.iterdir() if path.is_dir() and not path.is_symlink()]
    at = ("--run", str(run))
    before = load_file(run / "adapter.safetensors")

    from fednano.unlearning.jobs.holdings import RunHoldings

    holding = RunHoldings(run).holding(SITE)
    assert holding is not None
    gone = list(holding.first_round)[:2]
    ids = sandbox.folder / "ids.txt"
    ids.write_text("\n".join(gone) + "\n")
    unlearn("keygen", "--site", SITE, "--keys", keys, *at)
    options = [str(word) for pair in PLAN.items() for word in pair]
    unlearn(
        *(
            "submit",
            "--site",
            SITE,
            "--key",
            f"{keys}/{SITE}.key",
            "--samples",
            str(ids),
            "--reason",
            "Art. 17",
        ),
        *options,
        *at,
    )
    twin = sandbox.folder / "twin" / run.name
    shutil.copytree(run, twin)

    live = ("fednano", "unlearn", "run", "--superlink", superlink, "--app", str(ROOT), "--json", *at)
    (job,) = json.loads(sandbox.run(*live).stdout)
    assert job["state"] == "committed", job
    receipt = sandbox.folder / "receipt.json"
    unlearn("receipt", job["job"], "--out", str(receipt), *at)
    key = run / "unlearning" / "server.pub"
    body = json.loads(unlearn("verify-receipt", str(receipt), "--key", str(key), "--json"))["receipt"]
    assert body["scope"]["samples"] == len(gone)
    assert body["site_statement"]["statement"]["adapter"] == body["adapter"]["after"]
    figures = body["metrics"]
    assert figures["after"]["forget"]["probability"] < figures["before"]["forget"]["probability"]
    unlearn("verify", job["job"], *at)
    assert not any(each in receipt.read_text() for each in gone)

    # To the bit what the same job computes where all data lie on one machine.
    unlearn("run", "--run", str(twin))
    after, local = (load_file(path / "adapter.safetensors") for path in (run, twin))
    assert all(after[name].equal(local[name]) for name in before)
    assert not all(after[name].equal(before[name]) for name in before)
