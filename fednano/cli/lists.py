"""`fednano strategies` and `fednano adapters`: what there is, readable at any width."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Annotated, Any

import typer

from fednano.errors import ConfigError

__all__ = ["adapters", "strategies"]

_WIDEST = 100


def strategies(
    name: Annotated[str | None, typer.Argument(help="One rule; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the merge rules: what each is exact for, what it costs, what it composes with."""
    import fednano

    _show(fednano.strategies(name), as_json=as_json)


def adapters(
    name: Annotated[str | None, typer.Argument(help="One adapter; all by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the adapters with their options."""
    from fednano.adapters import create, names, options

    if name is not None and name not in names():
        raise ConfigError(f"there is no adapter {name!r}; there are {', '.join(names())}.")
    rows = []
    for each in [name] if name else names():
        described = create(each)
        rows.append(
            {
                "adapter": each,
                "what": " ".join((type(described).__doc__ or "").partition("\n\n")[0].split()).replace(
                    "``", ""
                ),
                "algebra": described.algebra.value,
                "basis": described.basis.value,
                "options": ", ".join(f"{key}={value!r}" for key, value in options(each).items()),
            }
        )
    _show(rows, as_json=as_json)


def _show(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """The rows as JSON, or as cards: a name, what it is, and then what differs, wrapped at the terminal's width.

    A table of a dozen columns has no room for words at 80 columns.
    """
    if as_json:
        typer.echo(json.dumps(rows, indent=1, default=str))
        return
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    for row in rows:
        (_, name), (_, text), *more = row.items()
        flags = [key for key, value in more if value == "yes"]
        facts = [f"{key}: {value}" for key, value in more if value not in ("yes", "no", "")]
        if flags:
            facts.append(f"works with: {', '.join(flags)}")
        typer.secho(str(name), bold=True)
        for line in (str(text), " · ".join(facts)):
            typer.echo(
                textwrap.fill(
                    line, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
                )
            )
