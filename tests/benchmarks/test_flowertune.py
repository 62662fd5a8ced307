"""The comparison with a FlowerTune-style app: both run, and what is counted is what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import flowertune
import tables

BENCHMARKS = Path(flowertune.__file__).parent


def row(system: str, **more: Any) -> dict[str, Any]:
    base = {"system": system, "seconds_to_first_round": 20.0, "seconds_per_round": 2.0, "client_bytes": 8e8}
    base |= {"host_bytes": 0, "adapter_bytes": 100.0, "activation_bytes": 0.0, "client_parameters": 1000}
    return base | {"accuracy": 0.5, "learning_rate": 0.003, "seed": 0} | more


def test_lines_are_counted_without_comments_and_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "app.py"
    path.write_text(
        '"""What\n\nthis is."""\n\n# why\nimport json  # used\n\n\ndef f():\n    """Doc."""\n    return "text"\n'
    )
    assert flowertune.code_lines(path) == 3


def test_the_peer_gets_its_best_learning_rate() -> None:
    rows = [
        row("fednano", accuracy=0.6),
        row("flowertune-style", accuracy=0.4, learning_rate=0.001),
        row("flowertune-style", accuracy=0.9, learning_rate=0.01, seconds_per_round=3.0),
        row("flowertune-style", accuracy=0.7, learning_rate=0.01, seconds_per_round=5.0, seed=1),
    ]
    ours, theirs = flowertune.summarise(rows)
    assert theirs["accuracy"] == pytest.approx(0.8)
    assert theirs["seconds_per_round"] == 4.0
    assert (theirs["learning_rate"], theirs["repeats"]) == (0.01, 2)
    assert ours["lines_of_code"] < theirs["lines_of_code"]
    missed = {gate.name: gate.met for gate in flowertune.gates([ours, theirs])}
    assert missed["accuracy_below_peer"] is False
    table = tables.flowertune({"rows": [ours, theirs, *rows]})
    assert "| Accuracy, % | 60.0 | 80.0 |" in table


def test_seconds_come_from_begin_and_end_of_rounds() -> None:
    found = flowertune.row_of("x", 100.0, {1: 110.0, 2: 120.0, 3: 130.0}, {1: 118.0, 2: 122.0, 3: 134.0})
    assert (found["seconds_to_first_round"], found["seconds_of_round_1"]) == (18.0, 8.0)
    assert found["seconds_per_round"] == 3.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_run_in_small(tmp_path: Path) -> None:
    out = tmp_path / "flowertune.json"
    command = [sys.executable, str(BENCHMARKS / "flowertune.py"), "--small", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=800)
    ours, theirs = (each for each in json.loads(out.read_text())["rows"] if each.get("summary"))
    assert ours["zero_shot"] == theirs["zero_shot"]  # the same model, judged alike on the same questions
    assert ours["client_parameters"] < theirs["client_parameters"]
    assert theirs["adapter_bytes"] > 0
    assert ours["activation_bytes"] > 0
    assert min(ours["client_bytes"], theirs["client_bytes"], ours["host_bytes"]) > 50e6
