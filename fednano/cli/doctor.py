"""`fednano doctor`: will a run with these settings work here?"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fednano.cli.options import settings_options

__all__ = ["doctor"]


@settings_options
def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    settings: dict[str, Any],
) -> None:
    """Say what fits on which side, what will travel, and what will not work; takes the settings of a run.

    Ends with exit code 7 where something will not work. Loads no weights and trains nothing.
    """
    from fednano.federation.config import RunConfig

    config = RunConfig.from_mapping(settings)
    from fednano.cli.failure import EXIT_UNFIT
    from fednano.federation.checkup import check_all

    found = check_all(config)
    if as_json:
        typer.echo(json.dumps([check.to_json() for check in found], indent=1))
    else:
        colours = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "problem": typer.colors.RED}
        for check in found:
            typer.secho(f"{check.status:<8}", fg=colours[check.status], nl=False)
            typer.echo(f"{check.topic}, {check.name}: {check.text}")
    if any(check.status == "problem" for check in found):
        raise typer.Exit(EXIT_UNFIT)
