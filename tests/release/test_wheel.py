"""What is released: the wheel holds what fednano needs, nothing else, and works outside of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import fednano

ROOT = Path(__file__).parents[2]
PARTS = ("fednano", "kernels", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
SMALL = ["--backend", "inprocess", "--progress", "plain", "--rounds", "1", "--clients", "2", "--samples", "4", "--rank",
         "2", "--streams", "text", "--batch-size", "4", "--evaluate-samples", "4", "--final-samples", "4", "--holdout",
         "0"]  # fmt: skip


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_one_version_everywhere() -> None:
    version = fednano.__version__
    assert project()["version"] == version
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    released = [tuple(map(int, each.split("."))) for each in headings[1:]]
    assert released == sorted(released, reverse=True)
    assert all(each <= tuple(map(int, version.split("."))) for each in released)


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "fednano").rglob("*.py")
        if "scaffold" not in path.parts
    }
    assert there | {"fednano_kernels"} == listed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel; the wheel is built from the sdist, as `python -m build` does."""
    pytest.importorskip("build", reason="the package 'build' is not installed")
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=unwanted)
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(path, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


@pytest.mark.acceptance
def test_what_the_wheel_holds(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    assert wheel.name == f"fednano-{fednano.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fednano", "fednano_kernels", f"fednano-{fednano.__version__}.dist-info"}
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fednano").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    extra = {name for name in names if name.startswith("fednano/")} - ours
    missing = {name for name in ours if not name.endswith(".md") and "generate.py" not in name} - names
    assert not extra
    assert not missing
    assert "fednano/models/tiny/model.safetensors" in names
    assert {"fednano/py.typed", "fednano_kernels/py.typed"} <= names
    assert not [
        name for name in names if re.search(r"(^|/)(tests?|benchmarks|simulations|runs/\d|examples)/", name)
    ]
    assert wheel.stat().st_size < 20_000_000


@pytest.mark.acceptance
def test_what_the_sdist_holds(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "fednano/models/tiny/model.safetensors"} <= names


@pytest.mark.acceptance
def test_the_wheel_works_by_itself(built: Path, tmp_path: Path) -> None:
    """In a new environment that sees this one's packages, but not this checkout."""
    [wheel] = built.glob("*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    # A plain path in a .pth file is searched, but the .pth files there are not read: no editable fednano comes along.
    (site / "parent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(scripts / "python"),
        "install",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, env=environment, timeout=300)

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(scripts / words[0]), *words[1:]], capture_output=True, text=True, cwd=tmp_path, env=environment,
            check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    place = run(
        "python", "-c", "import fednano, fednano_kernels; print(fednano.__file__, fednano_kernels.__file__)"
    )
    assert place.count(str(home)) == 2
    assert f"fednano {fednano.__version__}" in run("fednano", "--version")
    assert "simulate" in run("fednano", "--help")
    assert json.loads(run("fednano", "simulate", *SMALL, "--json"))["rounds"] == 1
    [report] = tmp_path.glob("runs/*-*/report.html")
    assert "</html>" in report.read_text()
    assert run("fednano", "export", "latest").strip().endswith("peft")
    assert (tmp_path / run("fednano", "init", "ward-study").splitlines()[0] / "pyproject.toml").is_file()
