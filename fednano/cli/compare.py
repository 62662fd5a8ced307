"""`fednano compare`: several runs side by side, in the terminal and as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare"]


def compare(
    runs: Annotated[list[str], typer.Argument(help="Ids or folders of two runs or more.")],
    out: Annotated[
        Path | None, typer.Option(help="Also write a page to this file, such as compare.html.")
    ] = None,
    runs_dir: Annotated[str, typer.Option(help="Folder of the run folders.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Compare finished runs: what they reached, what it cost, and in which settings they differ."""
    from fednano.runs import RunFolder
    from fednano.runs.comparison import compare_runs, write_comparison

    found = compare_runs([RunFolder.open(run, root=runs_dir) for run in runs])
    if out is not None:
        write_comparison(found, out)
    if as_json:
        typer.echo(json.dumps(found.to_json() | ({"page": str(out)} if out else {}), indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", *found.names, title="Figures", title_justify="left")
    for row in found.rows:
        cells = [Text(text, style="bold green" if n in row.best else "") for n, text in enumerate(row.shown)]
        table.add_row(row.name, *cells)
    console.print(table)
    if found.settings:
        table = Table("", *found.names, title="Settings that differ", title_justify="left")
        for key, values in found.settings:
            table.add_row(key, *(Text(value or "-") for value in values))
        console.print(table)
    for text in found.cautions:
        console.print(Text(text, style="yellow"))
    if out is not None:
        console.print(Text(str(out)), soft_wrap=True)
