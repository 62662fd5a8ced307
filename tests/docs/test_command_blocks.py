"""Every command in README and docs is one that there is; those not marked otherwise are really run, in small."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from blocks import PAGES, ROOT, SHELLS, Block, blocks, expanded, words
from typer.testing import CliRunner

from fednano.cli.commands import app

# They serve until they are ended: tests/dashboard and tests/network start them.
SERVICES = {("dashboard",), ("server", "up"), ("client", "up"), ("host",)}
SMALL = ["--backend", "inprocess", "--progress", "plain", "--rounds", "1", "--clients", "3", "--samples", "4",
         "--batch-size", "4", "--evaluate-samples", "4", "--final-samples", "4", "--rank", "4",
         "--holdout", "0.01"]  # fmt: skip
LIGHT = {"docs/tutorials/three-sites.md"}  # trains nothing
COMMANDS = [block for page in PAGES for block in blocks(page) if block.language in SHELLS]
RUNNABLE = (*SHELLS, "python")
RUN = [page for page in PAGES if any(b.language in RUNNABLE and not b.why for b in blocks(page))]


def command_of(line: str) -> tuple[click.Command, tuple[str, ...], list[str]] | None:
    """The command that a line calls, its path, and what is given to it; None for another program."""
    program, *rest = words(line)
    if program != "fednano":
        return None
    found: click.Command = typer.main.get_command(app)
    path: tuple[str, ...] = ()
    while isinstance(found, click.Group) and rest and not rest[0].startswith("-"):
        assert rest[0] in found.commands, f"there is no command {' '.join((*path, rest[0]))}"
        path, found, rest = (*path, rest[0]), found.commands[rest[0]], rest[1:]
    return found, path, rest


def test_the_pages_have_blocks() -> None:
    assert len(COMMANDS) > 30
    assert len(RUN) > 5
    for block in COMMANDS:
        assert block.language == "bash", f"{block.place}: write ```bash, as everywhere"


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.place)
def test_commands_and_options_exist(block: Block) -> None:
    for line in block.commands:
        called = command_of(line)
        if called is None:
            continue
        command, path, given = called
        if path == ("host",) and given[:1] != ["bench"]:
            from fednano.host.options import parser

            parser().parse_args(given)
        elif path[:1] not in (("host",), ("bench",)):
            with contextlib.suppress(click.exceptions.Exit):  # --help, --version
                command.make_context("fednano", list(given))  # raises where an option is unknown or missing


def test_an_option_that_is_not_there_is_found() -> None:
    called = command_of("fednano simulate --ruond 3")
    assert called is not None
    with pytest.raises(click.NoSuchOption):
        called[0].make_context("fednano", called[2])
    with pytest.raises(AssertionError, match="no command simlate"):
        command_of("fednano simlate")


def test_reasons_are_given_and_name_what_there_is() -> None:
    for block in COMMANDS:
        for word in block.why.replace(",", " ").replace(";", " ").split():
            if word.startswith(("tests/", "docs/")):
                assert (ROOT / word).exists(), f"{block.place}: {word} is not there"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if str(page.relative_to(ROOT)) in LIGHT else pytest.mark.acceptance)
        for page in RUN
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom in a folder of their own, where what they name is at hand."""
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.file:
            (Path.cwd() / block.file).write_text(block.text)
        elif block.language == "python" and not block.why:
            monkeypatch.syspath_prepend(str(tmp_path))
            exec(compile(block.text, block.place, "exec"), {"__name__": "example"})
        elif block.language in SHELLS and not block.why:
            for line in block.commands:
                run(line, block.place, monkeypatch)


def run(line: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = command_of(line)
    if called is None:
        program, *rest = words(line)
        if program == "cd":
            monkeypatch.chdir(rest[0])
        elif program != ".":  # the environment is this one
            subprocess.run(["bash", "-c", line], check=True, timeout=60)
        return
    _, path, _ = called
    if path in SERVICES:
        return
    given = ["latest" if word == "RUN" else word for word in expanded(line, Path.cwd())[1:]]
    if path == ("simulate",):
        given += SMALL
    if path == ("deploy", "enroll") and "--partition" in given:
        given += ["--partition", "0/3"]
    done = CliRunner().invoke(app, given)
    problem = done.exception if not isinstance(done.exception, SystemExit) else None
    assert done.exit_code == 0, f"{place}: {line}\n{done.output}\n{problem!r}"


def prepare(folder: Path) -> None:
    """What the pages take for given: data of one's own, a model folder, a picture, a list of ids, a tracker."""
    from PIL import Image

    import fednano

    rows = [{"question": f"is shape {n} red ?", "answer": "yes" if n % 2 else "no"} for n in range(40)]
    (folder / "my-data").mkdir()
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "my-data" / f"{split}.jsonl").write_text(lines)
    with (folder / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        writer.writerows([f"the film was {'good' if n % 2 else 'bad'} {n}", n % 2] for n in range(60))
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "llava").symlink_to(
        Path(fednano.__file__).parent / "models" / "tiny", target_is_directory=True
    )
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "cat.png")
    (folder / "my_trackers.py").write_text(
        "class Printer:\n    def start(self, info, settings): ...\n    def log(self, values, *, step): ...\n"
        "    def finish(self, status): ...\n"
    )


@pytest.fixture(autouse=True)
def _as_it_was() -> None:
    """What a page imports from its folder does not stay."""
    from fednano.adapters import registry

    for name in ("my_trackers", "block_diagonal"):
        sys.modules.pop(name, None)
    registry._REGISTRY.pop("block-diagonal", None)
