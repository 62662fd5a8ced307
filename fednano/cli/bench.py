"""`fednano bench`: the project's own benchmarks, from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import typer

from fednano.errors import ConfigError

__all__ = ["app"]

_FREE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure, from a checkout of the project."
)


def _run(name: str, arguments: list[str]) -> NoReturn:
    """Run ``benchmarks/<name>.py`` as the program it is, and end with its exit status."""
    import fednano

    root = Path(fednano.__file__).parents[1]
    if not (root / "benchmarks" / f"{name}.py").is_file():
        raise ConfigError(
            "benchmarks are not part of the installed package. Clone the project, install it with 'make', and run "
            "this command from there."
        )
    # A program of its own: some start workers, which must be able to import it as the main module.
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)
    sys.exit(code.returncode)


@app.command(context_settings=_FREE)
def kernels(context: typer.Context) -> None:
    """Build, check and time every Triton kernel on one GPU. `fednano bench kernels --help` lists the options."""
    _run("kernels", list(context.args))


@app.command("main-job", context_settings=_FREE)
def main_job(context: typer.Context) -> None:
    """The main job over several seeds, with its baselines."""
    _run("main_job", list(context.args))


@app.command(context_settings=_FREE)
def adapters(context: typer.Context) -> None:
    """Every adapter in the federated job at equal steps."""
    _run("adapters", list(context.args))


@app.command(context_settings=_FREE)
def aggregation(context: typer.Context) -> None:
    """Time and memory of the merge rules."""
    _run("aggregation", list(context.args))
