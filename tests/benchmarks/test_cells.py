"""Tables of runs: what is measured stays measured, and a gate speaks of the seeds that both sides have."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import robustness
import tables
from cells import Table
from results import Gate, read_results


def square(number: int) -> dict[str, Any]:
    """Measures a number, in another process."""
    if number < 0:
        raise ValueError("no such cell")
    return {"number": number, "square": math.prod((number, number))}


def largest(rows: Sequence[Mapping[str, Any]]) -> list[Gate]:
    return [Gate("largest", max(row["square"] for row in rows), 10.0, "<=")]


def table(path: Path) -> Table:
    return Table(path, key=lambda row: row["number"], order=lambda row: row["number"], gates=largest)


def test_rows_are_written_one_by_one_and_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where the workers find `square`
    path, said = tmp_path / "squares.json", lambda row: f"{row['number']}"
    first = table(path)
    with pytest.raises(ValueError, match="no such cell"):
        first.work_off([3, 1, -1], square, at_a_time=1, line=said)
    kept = read_results(path)["rows"]
    assert [row["square"] for row in kept] == [1, 9]
    again = table(path)
    again.work_off([4, 3, 1], square, at_a_time=1, line=said)
    assert capsys.readouterr().out.split() == ["3", "1", "4"]
    assert [row["square"] for row in read_results(path)["rows"]] == [1, 9, 16]
    assert [gate.met for gate in again.gates()] == [False]


def attacked(rule: str, seed: int, clean: float, under: float) -> list[dict[str, Any]]:
    cell = {"rule": rule, "clients": 5, "partition": "iid", "seed": seed}
    return [{**cell, "attacked": on, "accuracy": value} for on, value in ((False, clean), (True, under))]


def test_a_robust_rule_may_fall_by_three_points_and_fedavg_must() -> None:
    rows = [
        *attacked("krum", 0, 0.90, 0.88),
        *attacked("krum", 1, 0.90, 0.86),
        *attacked("fedavg", 0, 0.9, 0.6),
    ]
    rows += attacked("median", 2, 0.9, 0.5)[:1]  # its attacked run is not there yet
    found = {gate.name: gate for gate in robustness.gates(rows)}
    assert set(found) == {f"{rule}: drop, 1 of 5 flip, iid" for rule in ("krum", "fedavg")}
    assert found["krum: drop, 1 of 5 flip, iid"].value == pytest.approx(0.03)
    assert all(gate.sense == (">=" if gate.name.startswith("fedavg") else "<=") for gate in found.values())
    shown = tables.robustness({"rows": rows}).splitlines()
    assert shown[2] == "| krum | 90.0 → 87.0 |"
    assert shown[4] == "| median | - |"


def test_bulyan_runs_only_where_it_can() -> None:
    cells = robustness.jobs(robustness.RULES, [0])
    assert {clients for rule, clients, *_ in cells if rule == "bulyan"} == {10}
    assert len(cells) == len(set(cells)) == 60
