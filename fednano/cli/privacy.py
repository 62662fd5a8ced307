"""`fednano privacy`: what a run gives away."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fednano.privacy.audit import Finding

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What a run gives away.")


@app.callback()
def _root() -> None:
    """A callback makes `privacy` a group of commands even while it has one."""


@app.command()
def audit(
    run: Annotated[str, typer.Argument(help="A simulated run's id or folder, or 'latest'.")] = "latest",
    samples: Annotated[int, typer.Option(help="Samples to attack, and of each client for membership.")] = 64,
    clients: Annotated[int, typer.Option(help="Clients whose updates are attacked, at most.")] = 5,
    noise: Annotated[
        str, typer.Option(help="Noise on embeddings to try, over their root mean square, with commas.")
    ] = "0.3,1,3",
    runs_dir: Annotated[str, typer.Option(help="Folder of the run folders.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Attack what a run puts on the wire, and say how often it works, for each way to protect it."""
    from fednano.errors import ConfigError

    try:
        levels = [float(part) for part in noise.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"noise is {noise!r}; expected numbers such as '0.1,0.5'.") from error
    from fednano.privacy.audit import audit_run

    found = audit_run(run, runs_dir=Path(runs_dir), samples=samples, clients=clients, noise=levels)
    typer.echo(json.dumps([asdict(finding) for finding in found], indent=1) if as_json else _text(found))


def _text(found: list[Finding]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table("attack", "by", "what is sent", "measure")
    for title in ("result", "by chance", "cases"):
        table.add_column(title, justify="right")
    for f in found:
        numbers = (f"{f.value:.3g}", f"{f.chance:.3g}", str(f.cases))
        table.add_row(f.attack, f.attacker, f.setting, f.measure, *numbers)
    console = Console(width=150)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
