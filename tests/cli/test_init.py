"""A scaffolded app runs at once, by every way that its README names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.cli.init import scaffold
from fednano.errors import ConfigError, DataError
from fednano.federation.config import RunConfig
from fednano.federation.model import load_data
from fednano.federation.recipe import read_recipe

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scaffold("ward-study", tmp_path_factory.mktemp("apps"))


def test_it_runs_at_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    short = ["--rounds", "1", "--samples", "8", "--placement", "local", "--runs-dir", str(tmp_path), "--json"]
    done = RUNNER.invoke(app, ["simulate", "--config", "pyproject.toml", "--backend", "inprocess", *short])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.output)
    assert (summary["clients"], summary["rounds"], summary["test_samples"]) == (3, 1, 60)
    [run] = [path for path in tmp_path.iterdir() if path.is_dir() and not path.is_symlink()]
    partition = json.loads((run / "partition.json").read_text())
    assert partition["kind"] == "folders"
    shapes = ["circle", "triangle", "rectangle"]  # each site asks about another one
    for own, (client, counts) in zip(shapes, sorted(partition["counts"].items()), strict=True):
        said = dict(zip(partition["labels"], counts, strict=True))
        assert [said.get(shape, 0) > 0 for shape in shapes] == [shape == own for shape in shapes], client


def test_its_recipe_and_rows_are_sound(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    config = RunConfig.from_mapping(read_recipe(made / "pyproject.toml"))
    data = load_data(config)
    assert {s.group for s in data} == {"north", "south", "west"}
    assert len({s.id for s in data}) == len(data) == 240
    assert not data.bad_rows
    with pytest.raises(DataError, match=r"has 3 folders \(north, south, west\)"):
        load_data(config.changed(clients=4))


def test_its_modules_find_what_they_import(made: Path) -> None:
    modules = [path for path in made.rglob("*.py") if "runs" not in path.parts]
    assert len(modules) >= 3
    for path in modules:
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": path.stem, "__file__": str(path)})


@pytest.mark.acceptance
def test_its_own_tests_pass(made: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=made, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("name", ["Ward", "ward study", "1st", "", "ward_study", "../x", "a--b"])
def test_names_that_do_not_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not do for an app"):
        scaffold(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(made: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        scaffold("ward-study", made.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("rounds = = 3", "is not TOML"),
        ("[tool.black]\n", r"has no table \[tool.flwr.app.config\]"),
        ("ruonds = 3\n", "unknown setting 'ruonds'. Did you mean 'rounds'"),
    ],
)
def test_recipes_that_are_none(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping(read_recipe(file))


def test_options_go_before_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('rounds = 7\nmodel = "nowhere"\n')
    done = RUNNER.invoke(app, ["doctor", "--config", str(file), "--model", "tiny", "--alpha", "0"])
    assert isinstance(done.exception, ConfigError)
    assert "alpha is 0.0" in str(done.exception)
