"""The commands as functions, with their names: ``fednano.simulate(rounds=3)`` is ``fednano simulate --rounds 3``.

Settings of a run are keyword arguments under the names of the options with ``_`` for ``-``. Mistakes raise a class of
`fednano.errors`. torch and Flower are imported by the first function that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fednano.exporting import Export
    from fednano.federation.checkup import Check
    from fednano.runs import RunFolder, RunView
    from fednano.runs.comparison import Comparison

__all__ = [
    "compare",
    "dashboard",
    "doctor",
    "export",
    "generate",
    "init",
    "report",
    "simulate",
    "status",
    "strategies",
]

Setting = bool | int | float | str


def _settings(config: str | Path | None, settings: dict[str, Setting]) -> dict[str, Any]:
    """What a file says, with what was given besides on top; under the names of ``RunConfig``."""
    from fednano.federation.recipe import read_recipe

    found = {} if config is None else read_recipe(Path(config))
    return {key.replace("-", "_"): value for key, value in found.items()} | settings


def simulate(
    *,
    config: str | Path | None = None,
    backend: str = "ray",
    progress: str = "auto",
    view: RunView | None = None,
    verbose: bool = False,
    **settings: Setting,
) -> RunFolder:
    """Tune adapters over simulated clients on this machine, and report.

    Args:
        config: a TOML file of settings, such as an app's ``pyproject.toml``.
        backend: ``"ray"`` (Flower's simulation engine) or ``"inprocess"``; both give the same bits.
        progress: ``"auto"``, ``"live"``, ``"plain"`` or ``"quiet"``.
        view: takes the run's events instead.
        verbose: show Flower's own log.
        settings: settings of the run, such as ``rounds=3``; they win over the file's.

    Returns:
        The run's folder: ``summary.json``, ``report.html``, the adapter, ...

    Raises:
        FednanoError: a setting is wrong, or the run cannot go on.
    """
    from fednano.federation.config import RunConfig
    from fednano.runs import RunFolder, make_view

    checked = RunConfig.from_mapping(_settings(config, settings))
    shown = view or make_view(progress)
    from fednano.federation.simulation import simulate as run

    return RunFolder(run(checked, backend=backend, view=shown, verbose=verbose))


def generate(
    run: str | Path,
    question: str,
    *,
    image: str | Path | None = None,
    max_new_tokens: int = 32,
    untuned: bool = False,
    runs_dir: str | Path = "runs",
) -> str:
    """Ask a tuned model; the answer. Raises FednanoError. Arguments as of `fednano generate`."""
    from fednano.runs import RunFolder

    folder = RunFolder.open(run, root=runs_dir)
    from fednano.federation.answer import answer

    picture = None if image is None else Path(image)
    return answer(
        str(folder.path),
        question,
        image=picture,
        max_new_tokens=max_new_tokens,
        untuned=untuned,
        runs_dir=Path(runs_dir),
    )


def export(
    run: str | Path = "latest",
    *,
    format: str = "peft",  # noqa: A002 - the option's name
    out: str | Path | None = None,
    rank: int | None = None,
    runs_dir: str | Path = "runs",
) -> Export:
    """Write a tuned adapter for other tools. Raises FednanoError. Arguments as of `fednano export`."""
    from fednano.runs import RunFolder

    folder = RunFolder.open(run, root=runs_dir)
    from fednano.exporting import export_run

    where = None if out is None else Path(out)
    return export_run(str(folder.path), format, out=where, rank=rank, runs_dir=Path(runs_dir))


def report(run: str | Path = "latest", *, runs_dir: str | Path = "runs") -> Path:
    """Write a run's ``report.html`` again from its files; its path. Raises RunError."""
    from fednano.runs import RunFolder, render_report

    return render_report(RunFolder.open(run, root=runs_dir).path)


def compare(
    runs: Sequence[str | Path], *, out: str | Path | None = None, runs_dir: str | Path = "runs"
) -> Comparison:
    """Compare finished runs, and write a page to ``out``. Raises RunError."""
    from fednano.runs import RunFolder
    from fednano.runs.comparison import compare_runs, write_comparison

    found = compare_runs([RunFolder.open(run, root=runs_dir) for run in runs])
    if out is not None:
        write_comparison(found, Path(out))
    return found


def doctor(*, config: str | Path | None = None, **settings: Setting) -> list[Check]:
    """Say what fits on which side, what will travel, and what will not work. Raises ConfigError for a wrong setting."""
    from fednano.federation.config import RunConfig

    checked = RunConfig.from_mapping(_settings(config, settings))
    from fednano.federation.checkup import check_all

    return check_all(checked)


def init(name: str, *, folder: str | Path | None = None) -> Path:
    """Make an app of one's own; its folder. Raises ConfigError."""
    from fednano.cli.init import scaffold

    return scaffold(name, Path.cwd() if folder is None else Path(folder))


def dashboard(
    runs_dir: str | Path = "runs", *, port: int = 8642, bind: str = "127.0.0.1", host_metrics: str = ""
) -> None:
    """Serve the web page of a folder of runs until the process is asked to end. Raises ConfigError."""
    from fednano.board import dashboard as serve

    serve(runs_dir, port=port, bind=bind, host_metrics=host_metrics, ready=print)


def status(server: str | Path = "federation/server", *, bundle: str | Path | None = None) -> dict[str, Any]:
    """What runs at a server, or with ``bundle`` at a site; ``["up"]`` tells whether anything does."""
    from fednano.deploy.status import gather

    return gather(Path(server if bundle is None else bundle), site=bundle is not None)


def strategies(name: str | None = None) -> list[dict[str, str]]:
    """The merge rules, or the one of that name: what each is exact for, costs, and composes with.

    Raises:
        ConfigError: there is no such rule.
    """
    from fednano.aggregation import rule_table
    from fednano.errors import ConfigError

    rows = rule_table()
    chosen = [row for row in rows if name in (None, row["rule"])]
    if not chosen:
        raise ConfigError(f"there is no rule {name!r}; there are {', '.join(row['rule'] for row in rows)}.")
    return chosen
