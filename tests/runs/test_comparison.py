"""Runs side by side: figures come from the runs' own files, and what does not compare is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.errors import RunError
from fednano.runs import RunFolder
from fednano.runs.comparison import compare_runs, comparison_html
from fednano.runs.report_data import collect
from fednano.runs.report_extra import client_heat, privacy_rows, spectra, spectrum_rows
from fednano.runs.report_metrics import read_metrics

NASTY = "<script>alert(1)</script>"


def copies(sample: RunFolder, root: Path, *changes: dict[str, Any]) -> list[RunFolder]:
    """The sample run, with changed summaries and settings."""
    found = []
    for number, change in enumerate(changes):
        path = root / f"run-{number}"
        shutil.copytree(sample.path, path)
        for name, part in change.items():
            file = path / f"{name}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | part))
        found.append(RunFolder.open(path))
    return found


def test_figures_settings_and_best(sample_run: RunFolder, tmp_path: Path) -> None:
    accuracy = json.loads((sample_run.path / "summary.json").read_text())["accuracy"]
    better = {"accuracy": accuracy | {"federated": 1.0}, "wall_seconds": 5000.0, "seed": 3}
    runs = copies(sample_run, tmp_path, {}, {"summary": better, "config": {"seed": 3, "rule": "fisher"}})
    found = compare_runs(runs)
    rows = {row.name: row for row in found.rows}
    assert rows["Accuracy, federated"].values == (accuracy["federated"], 1.0)
    assert rows["Accuracy, federated"].best == {1}
    assert rows["Accuracy, zero shot"].best == set()
    assert rows["Wall time"].best == {0}
    assert rows["Wall time"].shown[1] == "1:23:20"
    assert dict(found.settings) == {"rule": ("", "fisher"), "seed": ("0", "3")}
    assert found.to_json()["figures"]["Accuracy, federated"]["run-1"] == 1.0


def test_what_does_not_compare_is_said(sample_run: RunFolder, tmp_path: Path) -> None:
    odd = {
        "dataset": "other",
        "metric": "rouge-l",
        "test_samples": 7,
        "scores": {"federated": {"perplexity": 3.5}},
    }
    found = compare_runs(copies(sample_run, tmp_path, {}, {"summary": odd}))
    said = " ".join(found.cautions)
    for words in (
        "different data sets",
        "different metrics",
        "different numbers of test samples",
        "same seed",
    ):
        assert words in said
    rows = {row.name: row for row in found.rows}
    assert rows["Perplexity, federated"].shown == ("–", "3.50")
    assert "Score, federated" in rows
    assert any(
        "intervals of the scores overlap" in text
        for text in compare_runs(copies(sample_run, tmp_path / "b", {}, {})).cautions
    )


def test_the_page_is_whole_and_escapes_what_it_shows(sample_run: RunFolder, tmp_path: Path) -> None:
    runs = copies(sample_run, tmp_path, {}, {"config": {"model": NASTY}}, {"summary": {"dataset": NASTY}})
    page = comparison_html(compare_runs(runs))
    assert NASTY not in page
    assert page.count("<svg") >= 3
    assert "http" not in page.replace("http-equiv", "")
    assert "Settings that differ" in page


def test_the_command(sample_run: RunFolder, tmp_path: Path) -> None:
    copies(sample_run, tmp_path, {}, {"config": {"rule": "fisher"}})
    out = tmp_path / "compare.html"
    words = ["compare", "run-0", "run-1", "--runs-dir", str(tmp_path), "--out", str(out)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert "fisher" in done.output
    assert out.stat().st_size > 5000
    asked = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(asked.output)["runs"] == ["run-0", "run-1"]


def test_runs_that_cannot_be_compared(sample_run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="two runs or more, each once"):
        compare_runs([sample_run])
    with pytest.raises(RunError, match="two runs or more, each once"):
        compare_runs([sample_run, sample_run])
    [broken] = copies(sample_run, tmp_path, {})
    (broken.path / "summary.json").unlink()
    with pytest.raises(RunError, match=r"run run-0 has no outcome: .* --resume run-0"):
        compare_runs([sample_run, broken])


def test_the_heat_map_has_every_client_and_round(sample_run: RunFolder) -> None:
    metrics = read_metrics(sample_run.metrics())
    heat = client_heat(metrics)
    assert heat is not None
    assert [row["client"] for row in heat["rows"]] == [f"client-{k}" for k in range(5)]
    assert heat["columns"] == [str(number) for number in range(1, 9)]
    assert heat["rows"][3]["cells"][1]["text"] == "✗"
    shades = [cell["shade"] for row in heat["rows"] for cell in row["cells"] if cell["text"] != "✗"]
    assert (min(shades), max(shades)) == (0, 100)
    many = [
        {"phase": "federated", "round": n, "scope": "client", "client": "a", "loss": 1 / n}
        for n in range(1, 101)
    ]
    heat = client_heat(read_metrics(many))
    assert heat is not None
    assert heat["columns"] == [f"{n}–{min(n + 4, 100)}" for n in range(1, 101, 5)]
    assert client_heat(read_metrics([])) is None


def test_the_spectrum_is_that_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 4, generator=generator), torch.randn(4, 20, generator=generator)
    found = spectra(
        {"image.A": a, "image.B": b, "text.A": a, "text.gate": torch.zeros(4), "index": torch.arange(3)}
    )
    expected = np.linalg.svd(a.double().numpy() @ b.double().numpy(), compute_uv=False)[:4]
    np.testing.assert_allclose(found["image"], expected, rtol=1e-12)
    assert set(found) == {"image"}
    assert spectrum_rows({"image": [1.0, 1.0, 1.0, 0.0]})[0]["effective"] == "3.0"
    assert spectrum_rows({"image": [0.0, 0.0]})[0]["effective"] == "0.0"


def test_who_saw_what(sample_run: RunFolder, tmp_path: Path) -> None:
    split = dict(
        privacy_rows({"placement": "split", "wire-dtype": "int8", "dp": "off", "dp-noise": 1.0}, None)
    )
    assert "int8" in split["Embeddings"]
    assert split["Answers"].startswith("reached")
    assert split["Updates"] == "each client's reached the server"
    assert split["Differential privacy"] == "none: ε is not bounded"
    closed = dict(
        privacy_rows({"exchange": "label-private", "secure-aggregation": True, "dp": "client"}, None)
    )
    assert closed["Answers"].startswith("stayed")
    assert "sums over clients only" in closed["Updates"]
    assert "did not get to count" in closed["Differential privacy"]
    extra = {"extra": {"privacy": {"unit": "client", "epsilon": 2.71828, "noise": 0.8}}}
    [run] = copies(sample_run, tmp_path, {"summary": extra})
    counted = dict(privacy_rows({"placement": "local"}, collect(run).summary))
    assert (counted["ε"], counted["noise"]) == ("2.718", "0.8")
    assert "stayed" in counted["Embeddings, answers"]
