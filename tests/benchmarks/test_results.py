"""The one writer of results files: shape, gates, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    # The checkout is not on the path under pytest, and `benchmarks` is not installed: load the file itself.
    name = "fednano_benchmarks_results"
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


results = _load()
Gate, ResultsError = results.Gate, results.ResultsError


def _write(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "rows": [{"shape": "2x3", "ms": 1.5, "graph": False, "peer": None}],
        "gates": [Gate("fast", 1.5, 2.0, "<=")],
        "hardware": {"sm_clock_mhz": 1980},
        **changes,
    }
    document: dict[str, Any] = results.write_results(tmp_path / "thing.json", **arguments)
    return document


def test_round_trip_has_the_agreed_shape(tmp_path: Path) -> None:
    document = _write(tmp_path)
    assert tuple(document) == ("name", "commit", "date", "hardware", "versions", "command", "rows", "gates")
    assert document["name"] == "thing"
    assert document["gates"] == [{"name": "fast", "value": 1.5, "bound": 2.0, "sense": "<=", "met": True}]
    assert document["hardware"]["sm_clock_mhz"] == 1980
    assert document["hardware"]["cores"] >= 1
    assert "torch" in document["versions"]
    assert results.read_results(tmp_path / "thing.json") == document
    assert [p.name for p in tmp_path.iterdir()] == ["thing.json"]


@given(value=st.floats(-1e6, 1e6), bound=st.floats(-1e6, 1e6), sense=st.sampled_from(["<=", ">="]))
def test_met_follows_from_the_numbers(value: float, bound: float, sense: str) -> None:
    assert Gate("g", value, bound, sense).met == eval(f"{value!r} {sense} {bound!r}")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_not_a_measurement_is_refused(tmp_path: Path, number: float) -> None:
    with pytest.raises(ResultsError, match="finite"):
        Gate("g", number, 1.0, "<=")
    with pytest.raises(ResultsError, match="finite"):
        _write(tmp_path, rows=[{"nested": {"list": [1.0, number]}}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{}]}, "non-empty object"),
        ({"rows": [{"x": object()}]}, "what JSON can hold"),
        ({"rows": [{"x": {1: 2}}]}, "expected a string"),
        ({"gates": [Gate("a", 1, 1, "<="), Gate("a", 1, 1, ">=")]}, "twice"),
    ],
)
def test_bad_documents_are_refused_before_writing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ResultsError, match=message):
        _write(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "sense"), [("", "<="), ("g", "<")])
def test_bad_gates_are_refused(name: str, sense: str) -> None:
    with pytest.raises(ResultsError):
        Gate(name, 1.0, 1.0, sense)


def test_a_file_edited_by_hand_is_caught(tmp_path: Path) -> None:
    document = _write(tmp_path)
    file = tmp_path / "thing.json"
    lie = json.loads(json.dumps(document))
    lie["gates"][0].update(value=3.0)
    file.write_text(json.dumps(lie))
    with pytest.raises(ResultsError, match="says met=True"):
        results.read_results(file)
    for broken, message in [
        ({**document, "name": "other"}, "stem"),
        ({**document, "extra": 1}, "unknown"),
        ({k: v for k, v in document.items() if k != "rows"}, "missing"),
        ({**document, "date": "yesterday"}, "ISO 8601"),
    ]:
        file.write_text(json.dumps(broken))
        with pytest.raises(ResultsError, match=message):
            results.read_results(file)
    file.write_text("[")
    with pytest.raises(ResultsError, match="not JSON"):
        results.read_results(file)


def test_gates_can_be_read_off_the_same_rows_again(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    before = results.write_results(path, rows=[{"x": 3.0}], gates=[Gate("x", 3.0, 2.0, "<=")])
    results.judge_again(path, lambda rows: [Gate("half of x", rows[0]["x"] / 2, 2.0, "<=")])
    after = results.read_results(path)
    assert [(gate["name"], gate["met"]) for gate in after["gates"]] == [("half of x", True)]
    assert {key: value for key, value in after.items() if key != "gates"} == {
        key: value for key, value in before.items() if key != "gates"
    }


def test_commit_is_named_by_the_environment_or_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDNANO_COMMIT", "abc123")
    assert results.current_commit() == "abc123"
    monkeypatch.delenv("FEDNANO_COMMIT")
    assert results.current_commit(tmp_path) == "unknown"


def test_command_hides_this_machines_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "orig_argv", ["python3", "/some/where/bench.py", "--json", "/else/where/x.json", "-q"]
    )
    assert results.describe_command().split(" ", 1)[1] == "bench.py --json x.json -q"


def test_committed_results_have_the_agreed_shape() -> None:
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        results.read_results(file)
