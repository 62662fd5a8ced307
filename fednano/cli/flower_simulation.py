"""`flower-simulation`: the command that Flower used to ship, for those who know it by that name.

Runs the Flower app in a folder through Flower's simulation engine, as the old command did: server and client app from
``[tool.flwr.app.components]``, settings from ``[tool.flwr.app.config]`` and ``--run-config``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tomllib
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError
from fednano.federation.config import OTHER_WORK, UNPROTECTED, RunConfig
from fednano.federation.recipe import parse_settings

__all__ = ["main", "run_app"]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console command."""
    from fednano.cli.failure import reported

    parser = argparse.ArgumentParser(
        prog="flower-simulation", description="Run a Flower app in simulation (kept under its old name)."
    )
    parser.add_argument("--app", type=Path, required=True, help="folder of the app, with its pyproject.toml")
    parser.add_argument("--num-supernodes", type=int, required=True, help="number of simulated clients")
    parser.add_argument("--run-config", default="", help="settings to change: 'rounds=3 alpha=0.5'")
    parser.add_argument("--verbose", action="store_true", help="show Flower's own log")
    options = parser.parse_args(arguments)
    with reported():
        run_app(options.app, options.num_supernodes, options.run_config, verbose=options.verbose)


def run_app(folder: Path, supernodes: int, run_config: str = "", *, verbose: bool = False) -> Path:
    """Simulate the app in ``folder`` with ``supernodes`` clients; returns the run folder.

    Raises:
        ConfigError: no app there, fewer than one client, or a setting that is not understood.
    """
    if supernodes < 1:
        raise ConfigError(f"--num-supernodes is {supernodes}; expected at least 1.")
    project = folder / "pyproject.toml"
    if not project.is_file():
        raise ConfigError(f"no Flower app in {folder.absolute()}: it has no pyproject.toml.")
    try:
        flower = tomllib.loads(project.read_text())["tool"]["flwr"]["app"]
        components = flower["components"]
        server, client = components["serverapp"], components["clientapp"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(
            f"{project} does not describe a Flower app ({error}). Expected [tool.flwr.app.components] with serverapp "
            "and clientapp."
        ) from error
    settings = {
        **flower.get("config", {}),
        **parse_settings(run_config, "--run-config"),
        "clients": supernodes,
    }
    settings.pop(UNPROTECTED, False)
    if settings.pop(OTHER_WORK, ""):
        raise ConfigError("unlearning in a simulation needs no Flower: fednano unlearn run --run RUN")
    apps = [_load(folder, reference) for reference in (server, client)]
    from fednano.federation.apps import client_app
    from fednano.federation.simulation import simulate

    if apps[1] is not client_app:
        raise ConfigError(
            f"the app in {folder} has a client app of its own ({client}); this command runs fednano's. Use `flwr run`."
        )
    return simulate(RunConfig.from_mapping(settings), verbose=verbose)


def _load(folder: Path, reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    path = str(folder.absolute())
    sys.path.insert(0, path)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the app's component {reference!r} cannot be loaded from {folder}: {error}."
        ) from error
    finally:
        # The folder may hold packages whose bare names mean something else to other libraries.
        sys.path.remove(path)
