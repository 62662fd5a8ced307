"""`fednano server`, `client`, `run` and `status`: a federation at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fednano.errors import RunError

__all__ = ["client_app", "run", "server_app", "status"]

server_app = typer.Typer(
    no_args_is_help=True, help="The server of a federation of institutions.", rich_markup_mode=None
)
client_app = typer.Typer(
    no_args_is_help=True, help="A site of a federation of institutions.", rich_markup_mode=None
)

Server = Annotated[Path, typer.Option("--server", help="Folder of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_HERE = Path("federation/server")


@server_app.callback()
@client_app.callback()
def _group() -> None:
    pass


@server_app.command("up")
def server_up_(server: Server = _HERE) -> None:
    """Run SuperLink, gateway and language host until Ctrl-C or SIGTERM; what crashes is started again.

    Works on ordered runs and on unlearning jobs, one after the other.
    """
    from fednano.deploy.server import server_up

    server_up(server)


@client_app.command("up")
def client_up_(
    bundle: Annotated[Path, typer.Option(help="Folder with this site's keys and certificate.")],
) -> None:
    """Run this site's SuperNode until Ctrl-C or SIGTERM; if it crashes it is started again."""
    from fednano.deploy.client import client_up

    client_up(bundle)


def run(
    *, server: Server = _HERE, wait: bool = True, as_json: AsJson = False, settings: dict[str, Any]
) -> None:
    """Start a run among the enrolled sites, on a server that is up; resumed by itself after a crash."""
    from fednano.deploy.orders import Orders
    from fednano.security.place import ServerPlace

    orders = Orders(ServerPlace(server))
    made = order = orders.submit({name.replace("_", "-"): value for name, value in settings.items()})
    if not as_json:
        typer.echo(f"ordered {order.id}")
    shown, noted = 0, ""
    for order in orders.followed(made) if wait else ():
        if order.run and not as_json:
            lines = _progress(orders.runs / order.run)
            for line in lines[shown:]:
                typer.echo(line)
            shown = max(shown, len(lines))
        if order.state == "waiting" and order.note != noted and not as_json:
            typer.echo(order.note, err=True)
        noted = order.note
    if as_json:
        summary = orders.runs / order.run / "summary.json"
        done = json.loads(summary.read_text()) if order.state == "done" else None
        typer.echo(json.dumps({"order": order.id, "state": order.state, "run": order.run, "summary": done}))
    elif order.state == "done":
        typer.echo(f"{orders.runs / order.run}")
    if order.state == "failed":
        raise RunError(f"the run failed: {order.note}")


def status(
    *,
    server: Server = _HERE,
    bundle: Annotated[Path | None, typer.Option(help="At a site: its bundle.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what runs: nodes, run and round, host load, jobs. Exit code 5 when nothing is up."""
    from fednano.deploy.status import gather, lines

    found = gather(bundle if bundle is not None else server, site=bundle is not None)
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
    if not found["up"]:
        raise typer.Exit(5)


def _progress(folder: Path) -> list[str]:
    """A run's rounds so far, a line each."""
    from fednano.deploy.status import rounds

    return [
        "  ".join(f"{name} {value}" for name, value in each.items() if value is not None)
        for each in rounds(folder)
    ]
