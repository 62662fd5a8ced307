"""The command line: quick to answer, clear about mistakes, documented exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from fednano.cli.commands import app
from fednano.cli.failure import EXIT_HOST, EXIT_INTERRUPTED, EXIT_MISTAKE, reported
from fednano.cli.flower_simulation import run_app
from fednano.errors import ConfigError, HostUnavailable, Interrupted, RunError
from fednano.federation.config import RunConfig
from fednano.federation.recipe import parse_settings

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


def fednano(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "fednano"), *words], capture_output=True, text=True, cwd=folder, check=False, timeout=120
    )


def test_help_comes_without_loading_torch_or_flower() -> None:
    heavy = (
        "('torch', 'flwr', 'transformers', 'numpy', 'numba', 'scipy', 'jinja2', 'starlette', 'grpc', "
        "'cryptography')"
    )
    code = f"import sys, fednano.cli.commands; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
    assert "simulate" in fednano("--help").stdout


def commands(group: click.Command, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    if not isinstance(group, click.Group):
        return {path: group}
    return {k: v for name, each in group.commands.items() for k, v in commands(each, (*path, name)).items()}


def test_every_command_prints_json_if_asked() -> None:
    # Programs with options of their own (the host prints JSON anyway), and services, which have no result.
    without = {("host",), ("server", "up"), ("client", "up")}
    for path, command in commands(typer.main.get_command(app)).items():
        options = [option for parameter in command.params for option in parameter.opts]
        assert ("--json" in options) != (path in without or path[0] == "bench"), path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_and_settings(shell: str) -> None:
    words = {"bash": {"COMP_WORDS": "fednano simulate --lear", "COMP_CWORD": "2"}}
    typed = {"_TYPER_COMPLETE_ARGS": "fednano simulate --lear", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [str(BIN / "fednano")], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, **words.get(shell, typed), "_FEDNANO_COMPLETE": f"complete_{shell}"},
    )  # fmt: skip
    assert "--learning-rate" in done.stdout


def test_exit_codes_are_documented() -> None:
    from fednano.cli import failure

    text = (ROOT / "docs" / "commands.md").read_text()
    codes = {getattr(failure, name) for name in failure.__all__ if name.startswith("EXIT_")} | {0, 1}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == codes
    listed = failure.__doc__ or ""
    assert {int(code) for code in re.findall(r"(?:^|[;:] )(\d+) ", " ".join(listed.split()))} == codes


def test_simulate_has_an_option_for_every_setting() -> None:
    text = CliRunner().invoke(app, ["simulate", "--help"], env={"COLUMNS": "200"}).output
    for key in RunConfig().to_mapping():
        assert f"--{key}" in text, key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simulate", "--clients", "0"], "clients is 0; expected at least 1"),
        (["simulate", "--alpha", "-1"], "alpha is -1.0; expected a positive number"),
        (["simulate", "--backend", "spark"], "backend is 'spark'; expected one of ray, inprocess"),
        (["generate", "nowhere", "what is it?"], "no run 'nowhere'"),
        (["report", "nowhere"], "no run 'nowhere'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    done = fednano(*words, folder=tmp_path)
    assert done.returncode == EXIT_MISTAKE
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_an_unknown_option_is_named() -> None:
    result = CliRunner().invoke(app, ["simulate", "--learning-rte", "1"])
    assert result.exit_code == 2
    assert "--learning-rate" in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), EXIT_MISTAKE),
        (RunError("x"), EXIT_MISTAKE),
        (HostUnavailable("x"), EXIT_HOST),
        (Interrupted("x"), EXIT_INTERRUPTED),
        (KeyboardInterrupt(), EXIT_INTERRUPTED),
    ],
)
def test_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, reported():
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_message_that_was_shown_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    error = RunError("told already")
    error.shown = True
    with pytest.raises(SystemExit), reported():
        raise error
    assert capsys.readouterr().err == ""


def test_strategies_and_adapters_are_listed() -> None:
    for command, names in (("strategies", {"fedavg", "fisher"}), ("adapters", {"nano", "lora"})):
        result = CliRunner().invoke(app, [command, "--json"])
        rows = json.loads(result.output)
        assert names <= {str(next(iter(row.values()))) for row in rows}
        plain = CliRunner().invoke(app, [command], env={"COLUMNS": "80"}).output
        assert max(map(len, plain.splitlines())) <= 80
        for row in rows:  # nothing is cut off, only broken between words
            for value in row.values():
                assert value in ("yes", "no") or value in " ".join(plain.split()), (row, value)
        [one] = json.loads(CliRunner().invoke(app, [command, sorted(names)[0], "--json"]).output)
        assert one in rows
        with pytest.raises(ConfigError, match="there is no"):
            CliRunner().invoke(app, [command, "nosuch"], catch_exceptions=False)


def test_python_has_the_commands_names() -> None:
    """What is one word on the command line is a function of the package, with the same arguments."""
    import inspect

    import fednano as package

    elsewhere = {"host", "adapters", "run"}  # packages; and an order to a server, which has no result here
    names = {path[0] for path in commands(typer.main.get_command(app)) if len(path) == 1} - elsewhere
    assert names == set(package.__all__) - {"__version__"}
    of_the_terminal = {
        "as_json",
        "progress",
        "verbose",
        "ready",
        "view",
        "kind",
        "format",
        *RunConfig.__annotations__,
    }
    for name in names:
        function = getattr(package, name)
        assert function.__doc__
        given = {p.name for p in typer.main.get_command(app).commands[name].params} - {"recipe_file", "help"}  # type: ignore[attr-defined]
        taken = set(inspect.signature(function).parameters) - {"settings", "config"}
        assert given - of_the_terminal == taken - of_the_terminal, name


def test_python_and_command_line_give_the_same() -> None:
    import fednano as package

    shown = json.loads(CliRunner().invoke(app, ["strategies", "--json"]).output)
    assert shown == package.strategies()
    with pytest.raises(ConfigError, match="rounds is 0"):
        package.simulate(rounds=0)
    with pytest.raises(RunError, match="no run 'nowhere'"):
        package.generate("nowhere", "what is it?")


class TestFlowerSimulation:
    def test_run_config_is_read_as_flower_writes_it(self) -> None:
        text = """rounds=3 rule="fisher" alpha=0.5 baselines=true"""
        assert parse_settings(text, "x") == {"rounds": 3, "rule": "fisher", "alpha": 0.5, "baselines": True}
        with pytest.raises(ConfigError, match="expected settings such as"):
            parse_settings("rounds", "--run-config")

    def test_no_app(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no Flower app"):
            run_app(tmp_path, 2)
        (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
        with pytest.raises(ConfigError, match="does not describe a Flower app"):
            run_app(tmp_path, 2)
        with pytest.raises(ConfigError, match="--num-supernodes is 0"):
            run_app(tmp_path, 0)

    def test_somebody_elses_app(self, tmp_path: Path) -> None:
        (tmp_path / "other_app_of_test.py").write_text("server = client = object()\n")
        (tmp_path / "pyproject.toml").write_text(
            "[tool.flwr.app.components]\nserverapp = 'other_app_of_test:server'\n"
            "clientapp = 'other_app_of_test:client'\n"
        )
        with pytest.raises(ConfigError, match="client app of its own"):
            run_app(tmp_path, 2)

    def test_every_setting_of_our_own_app_is_understood(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[RunConfig] = []
        monkeypatch.setattr(
            "fednano.federation.simulation.simulate", lambda config, **_: given.append(config) or Path()
        )
        run_app(Path(__file__).parents[2], 7, "rounds=3")
        assert (given[0].clients, given[0].rounds) == (7, 3)


def test_benchmarks_are_programs_that_the_command_finds() -> None:
    import subprocess

    for name in ("kernels", "aggregation"):
        command = [str(Path(sys.executable).with_name("fednano")), "bench", name, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["bench", "--clients", "2", "--", "--device-map", "cpu,cpu"],
        ["--model", "tiny", "--weights", "int8"],
    ],
    ids=lambda words: words[0],
)
def test_the_host_gets_its_words_as_they_are(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import fednano.host.cli as program

    given: list[str] = []
    monkeypatch.setattr(program, "main", lambda argv: given.extend(argv) or 7)
    assert CliRunner().invoke(app, ["host", *words]).exit_code == 7
    assert given == words
