"""The study of merge rules: what it makes of runs, and that it goes on where it was cut off."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "simulations"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
import tables  # noqa: E402
from results import validate  # noqa: E402

from fednano.errors import DataError  # noqa: E402
from fednano.federation import simulation  # noqa: E402


def row(
    rule: str, accuracy: float, seed: int, alpha: float = 0.1, rounds: int | None = None
) -> dict[str, Any]:
    return {
        **{"rule": rule, "alpha": alpha, "clients": 5, "seed": seed, "accuracy": accuracy},
        **{"judged": "test set", "rounds_to_target": rounds},
    }


ROWS = [
    row("fedavg", 0.90, 0, rounds=7),
    row("fedavg", 0.92, 1),
    row("centralised", 0.97, 0),
    row("mine", 0.95, 0),
]


def test_means_and_the_share_of_the_gap() -> None:
    means = study.overall([*ROWS, {"rule": "krum", "alpha": 0.1, "clients": 5, "seed": 0, "error": "no"}])
    fedavg = next(mean for mean in means if mean["rule"] == "fedavg")
    assert fedavg["accuracy"]["mean"] == pytest.approx(0.91)
    assert fedavg["accuracy"]["sd"] == pytest.approx(0.02 / 2**0.5)
    assert (fedavg["seeds"], fedavg["reached_target"], fedavg["rounds_to_target"]) == (2, 1, 7.0)
    assert {mean["rule"] for mean in means} == {"fedavg", "centralised", "mine"}
    assert study.closed_gap(means, "mine") == pytest.approx(4 / 6)
    assert study.closed_gap(means, "fedavg") == 0
    assert study.closed_gap(means, "unknown") is None


def test_rows_of_a_run_with_its_bounds() -> None:
    summary = {
        "rule": "fedavg",
        "accuracy": {
            "zero_shot": 0.5,
            "federated": 0.8,
            "fisher": 0.7,
            "local_only": 0.6,
            "centralised": 0.9,
        },
        "bytes": {"adapter_up_per_client_round": 7.0},
        "phases": {n: {"seconds": 1.0} for n in ("federated", "fisher", "local_only", "centralised")},
    }
    metrics = [
        {"phase": "federated", "scope": "global", "round": 1, "train_loss": 1.0, "accuracy": 0.75},
        {"phase": "federated", "scope": "global", "round": 1, "final": True, "accuracy": 0.8},
        {"phase": "fisher", "scope": "global", "round": 1, "train_loss": 1.0, "accuracy": 0.65},
    ]
    rows = {each["rule"]: each for each in study.rows_of(summary, metrics)}
    assert {rule: each["accuracy"] for rule, each in rows.items()} == {
        **{"fedavg": 0.8, "fisher": 0.7, "local-only": 0.6, "centralised": 0.9}
    }
    assert rows["fedavg"]["curve"] == [(1, 0.75)]
    assert rows["fisher"]["curve"] == [(1, 0.65)]


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*args: Any, **kwargs: Any) -> Path:
        calls.append(args)
        raise DataError("these data cannot be divided so")

    monkeypatch.setattr(simulation, "simulate", fails)
    cell = study.Cell("krum", 0.1, 50, 0, 2, 16, 12)
    first = study.measure(cell, tmp_path, 0.5)
    assert first == study.measure(cell, tmp_path, 0.5)
    assert first[0]["error"] == "these data cannot be divided so"
    assert len(calls) == 1
    kept = study.Cell("fedavg", 0.1, 5, 0, 2, 16, 12)
    kept.file(tmp_path).write_text(json.dumps([ROWS[0] | {"curve": [[1, 0.4], [2, 0.6], [3, 0.7]]}]))
    assert study.measure(kept, tmp_path, 0.5)[0]["rounds_to_target"] == 2
    assert kept.file(tmp_path) != study.Cell("fedavg", 0.1, 5, 0, 3, 16, 12).file(tmp_path)


def test_a_results_file_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "simulate", lambda *a, **k: pytest.fail("this cell is known"))
    cells = [study.Cell("fedprox mu=0.1", 0.1, 5, seed, 2, 16, 12) for seed in (0, 1)]
    rows = [row("fedprox", 0.9, 0, rounds=1) | {"cell": cells[0].mark, "curve": [[1, 0.95]]}, *ROWS]
    study.write(rows, tmp_path / "study.json")
    study.take_over(cells, tmp_path / "study.json", tmp_path)
    assert study.measure(cells[0], tmp_path, 0.5)[0]["accuracy"] == 0.9
    assert not cells[1].file(tmp_path).exists()  # another seed is another cell


def test_the_best_options_are_chosen_and_failures_are_not() -> None:
    cells = {
        study.Cell(f"fedprox mu={mu}", 0.3, 5, seed, 2, 16, 12): [outcome]
        for mu, outcomes in {
            0.1: [row("fedprox", 0.8, 100), row("fedprox", 0.8, 101)],
            0.01: [row("fedprox", 0.9, 100), {"rule": "fedprox", "error": "no"}],
        }.items()
        for seed, outcome in zip((100, 101), outcomes, strict=True)
    }
    assert study.best_trials(cells) == {"fedprox": "fedprox mu=0.1"}


def test_a_cell_s_settings(tmp_path: Path) -> None:
    cell = study.Cell("fedavgm beta=0.5 lr=2.0", 0.1, 50, 3, 2, 16, 12, 5, ("lr-schedule='cosine'",))
    config = cell.config(tmp_path)
    assert (config.rule, config.rule_options, config.lr_schedule) == ("fedavgm", "beta=0.5 lr=2.0", "cosine")
    assert config.participants(50) == 5
    assert study.Cell("fedavg", 0.1, 4, 3, 2, 16, 12).config(tmp_path).participants(4) == 4


def test_results_and_table(tmp_path: Path) -> None:
    target = tmp_path / "study.json"
    study.write(ROWS, target)
    document = json.loads(target.read_text())
    validate(document, stem="study")
    (gate,) = document["gates"]  # the default rule is FedAvg, which closes nothing of its own gap
    assert (gate["value"], gate["met"]) == (0, False)
    assert target.with_suffix(".svg").exists()
    assert "| fedavg | 91.0 ± 1.4 (2) |" in tables.study(document)


def test_small_matrix_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    pool = SimpleNamespace(submit=lambda *a, **k: pytest.fail("no run is wanted here"))
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *a, **k: nullcontext(pool))
    monkeypatch.setattr(study, "take_over", lambda *a: None)
    monkeypatch.setattr(
        study, "Cell", lambda *values: parsed.append(values) or SimpleNamespace(name=values[0])
    )
    with pytest.raises(pytest.fail.Exception, match="no run"):
        study.main(["--small", "--seeds", "5"])
    assert len(parsed) == 6  # what is named beside --small wins
