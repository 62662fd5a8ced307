"""`fednano audit`: look at a server's audit log, and check it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fednano.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="The server's signed log of what happened.", rich_markup_mode=None
)

Server = Annotated[Path, typer.Option(help="Folder of the server.")]
_HERE = Path("federation/server")


@app.command()
def verify(
    server: Server = _HERE,
    log: Annotated[Path | None, typer.Option(help="A copy of audit.jsonl, to be checked by --key.")] = None,
    key: Annotated[str, typer.Option(help="The server's audit.pub, got by another way than the log.")] = "",
    name: Annotated[str, typer.Option(help="Name of the federation, with --log.")] = "",
    head: Annotated[str, typer.Option(help="Head of an earlier check, which the log must contain.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every line's hash and signature; prints the head. Exit code 6 if the log is not what was written."""
    from fednano.security.audit import AuditLog
    from fednano.security.keys import load_public
    from fednano.security.place import ServerPlace

    if log is not None:
        if not key or not name:
            raise ConfigError("--log needs --key and --name as well.")
        if not log.is_file():
            raise ConfigError(f"there is no log {log}.")
        audit, public = AuditLog(log, name), load_public(key)
    else:
        place = ServerPlace(server)
        audit = AuditLog(server / "audit.jsonl", place.federation)
        public = load_public(key) if key else place.audit_key
    entries = audit.verify(public, head)
    if as_json:
        typer.echo(json.dumps({"events": len(entries), "holds": True, "head": audit.head()}))
        return
    typer.echo(f"{len(entries)} events, all signed and in order. Head: {audit.head()}")


@app.command()
def show(
    server: Server = _HERE,
    kind: Annotated[str, typer.Option(help="Events of this kind only, such as 'update refused'.")] = "",
    last: Annotated[int, typer.Option(help="The newest so many; 0 = all.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the events, after checking the log."""
    from fednano.security.audit import AuditLog
    from fednano.security.place import ServerPlace

    place = ServerPlace(server)
    entries = AuditLog(server / "audit.jsonl", place.federation).verify(place.audit_key)
    chosen = [entry for entry in entries if kind in ("", entry["kind"])]
    for entry in chosen[-last:] if last else chosen:
        if as_json:
            typer.echo(json.dumps(entry))
        else:
            told = "  ".join(f"{name}={value}" for name, value in entry["details"].items())
            typer.echo(f"{entry['time']}  {entry['kind']:<18} {told}".rstrip())
