"""A folder of runs whose content is known by hand, and a dashboard that serves it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fednano.runs import RunFolder

CLIENTS, ROUNDS = 3, 4


def client_row(number: int, client: int, **more: Any) -> dict[str, Any]:
    sent = {"adapter_up": 1000, "activation_up": 50_000 + client, "activation_down": 40_000}
    where = {"phase": "federated", "round": number, "scope": "client", "client": f"client-{client}"}
    return where | {"loss": 1 / number + client / 10, "samples": 100, "seconds": 1.5, "bytes": sent} | more


def round_rows(number: int) -> list[dict[str, Any]]:
    """Three clients and the merge of a round."""
    done = {
        "phase": "federated",
        "round": number,
        "scope": "global",
        "seconds": 5.0,
        "train_loss": 1 / number,
    }
    sent = {"adapter_up": 3000, "adapter_down": 6000, "activation_up": 150_003, "activation_down": 120_000}
    return [
        *(client_row(number, client) for client in range(CLIENTS)),
        done | {"accuracy": 0.5 + number / 10, "samples": 500, "bytes": sent},
    ]


def write_run(root: Path, name: str = "ward", rounds: int = ROUNDS) -> RunFolder:
    config = {
        "model": "tiny",
        "dataset": "easy-vqa",
        "adapter": "nano",
        "rule": "fedavg",
        "rounds": ROUNDS,
        "seed": 0,
    }
    run = RunFolder.create(root, name, config, command=["fednano", "simulate"])
    run.append_metrics({"phase": "zero-shot", "round": 0, "scope": "global", "accuracy": 0.4, "final": True})
    for number in range(1, rounds + 1):
        for row in round_rows(number):
            run.append_metrics(row)
    return run


@contextmanager
def served(root: Path, *options: str) -> Iterator[str]:
    """A dashboard as its user starts it, in a process of its own; yields its URL."""
    command = [
        str(Path(sys.executable).with_name("fednano")),
        "dashboard",
        "--runs",
        str(root),
        "--port",
        "0",
        "--json",
    ]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.wait(timeout=30)
