"""`fednano init`: an app of one's own, with recipe, data folders and tests, that runs at once."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated

import typer

from fednano.errors import ConfigError

if TYPE_CHECKING:
    from fednano.data import Sample

__all__ = ["init", "scaffold"]

_SITES = {"north": "circle", "south": "triangle", "west": "rectangle"}
_ROWS, _TEST_ROWS = 80, 60


def init(
    name: Annotated[str, typer.Argument(help="Name of the app; a folder of that name is made.")],
    folder: Annotated[Path | None, typer.Option(help="Where to make it; here by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Make an app of your own: recipe, one data folder for each site, tests. It runs as it is."""
    made = scaffold(name, folder or Path.cwd())
    if as_json:
        written = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
        typer.echo(json.dumps({"folder": str(made), "files": written}))
        return
    typer.echo(f"{made}\n  cd {name}\n  fednano simulate --config pyproject.toml")


def scaffold(name: str, where: Path) -> Path:
    """Write the app.

    Args:
        name: letters, digits and hyphens, a letter first.
        where: folder that gets it.

    Returns:
        The app's folder.

    Raises:
        ConfigError: the name does not do, or there is such a folder.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(
            f"the name {name!r} does not do for an app; expected small letters, digits and hyphens, such as ward-study."
        )
    target = where / name
    if target.exists():
        raise ConfigError(f"{target} exists already. Choose another name, or move it away.")
    package = name.replace("-", "_") + "_app"
    values = {"name": name, "package": package, "publisher": "me", "clients": str(len(_SITES))}
    source = files("fednano.cli") / "scaffold"
    try:
        for path in ("pyproject.toml", "README.md"):
            _write(target / path, Template((source / f"{path}.txt").read_text("utf-8")).substitute(values))
        for part in ("server_app.py", "client_app.py"):
            _write(
                target / package / part,
                Template((source / f"{part}.txt").read_text("utf-8")).substitute(values),
            )
        _write(target / package / "__init__.py", f'"""The Flower app of {name}."""\n')
        _write(target / "tests" / "test_recipe.py", (source / "test_recipe.py.txt").read_text("utf-8"))
        _write(target / ".gitignore", "runs/\ndata/\n__pycache__/\n")
        _data(target / "data")
    except OSError as error:
        raise ConfigError(
            f"the app cannot be written to {target}: {error.strerror}. Choose another --folder."
        ) from error
    return target


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _data(folder: Path) -> None:
    """Some rows of easy-VQA for each site, about another shape at each, and some of everything to judge by."""
    from fednano.data import load_easy_vqa

    train, test = load_easy_vqa("train"), load_easy_vqa("test")
    for site, shape in _SITES.items():
        own = [sample for sample in train if shape in f"{sample.question} {sample.answer}"]
        _rows(folder / "sites" / site, "train", own[: _ROWS * 5 : 5])
    step = len(test) // _TEST_ROWS
    _rows(folder, "test", list(test)[: step * _TEST_ROWS : step])


def _rows(folder: Path, split: str, samples: list[Sample]) -> None:
    lines = []
    for sample in samples:
        assert sample.image is not None
        copy = folder / "images" / f"{split}-{sample.image.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.image, copy)
        lines.append(json.dumps({"image": copy.name, "question": sample.question, "answer": sample.answer}))
    _write(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
