"""`fednano deploy`: who belongs to a federation; keys, certificates, and the files that run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fednano.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Make a federation of institutions: keys, certificates, enrolment, unit files.",
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Option("--federation", help="Folder that `deploy init` made.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_HERE = Path("federation")


def _say(as_json: bool, value: dict[str, Any], *lines: str) -> None:
    typer.echo(json.dumps(value) if as_json else "\n".join(lines))


@app.command()
def example(as_json: AsJson = False) -> None:
    """Print a federation.toml to start from."""
    from fednano.deploy.plan import EXAMPLE

    typer.echo(json.dumps({"federation.toml": EXAMPLE}) if as_json else EXAMPLE, nl=as_json)


@app.command()
def init(
    plan: Annotated[Path, typer.Argument(help="The federation.toml.")],
    federation: Folder = _HERE,
    as_json: AsJson = False,
) -> None:
    """Make authority, server certificate, signing keys, and an invitation for each site."""
    from fednano.deploy.plan import Plan
    from fednano.deploy.provision import init as make

    read = Plan.read(plan)
    make(read, federation)
    server, authority = federation / "server", federation / "authority"
    letters = {site: str(federation / "invitations" / f"{site}.invitation.json") for site in read.sites}
    _say(
        as_json,
        {"server": str(server), "authority": str(authority), "invitations": letters},
        f"{server}: for the server machine (it holds the server's private keys)",
        f"{authority}: signs certificates; keep it offline where you can",
        *(f"{path}: send to {site} by a way that only {site} can read" for site, path in letters.items()),
    )


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="Name of the site.")],
    federation: Folder = _HERE,
    as_json: AsJson = False,
) -> None:
    """Invite a further site, or one that lost its keys or was revoked."""
    from fednano.deploy.provision import invite as make

    path = str(make(federation, site))
    _say(as_json, {"site": site, "invitation": path}, path)


@app.command()
def enroll(
    given: Annotated[Path, typer.Argument(help="The invitation; later the signed file that came back.")],
    bundle: Annotated[Path, typer.Option(help="Folder for this site's keys and certificate.")],
    data: Annotated[str, typer.Option(help="Folder with this site's data.")] = "",
    partition: Annotated[
        str, typer.Option(help="K/N instead of data: part K (from 0) of N of a public data set, to rehearse.")
    ] = "",
    models: Annotated[
        str, typer.Option(help="Folder with the client's part of the model, from `fednano deploy edge`.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """At the site: make keys and a request for the operator; then take in the certificate that comes back."""
    from fednano.deploy.enrolment import enroll as make

    done = make(given, bundle, _node_config(data, partition, models))
    whole = done == bundle
    ready = f"{bundle} is complete. Start with: fednano client up --bundle {bundle}"
    _say(
        as_json,
        {"bundle": str(bundle), "complete": whole, "request": None if whole else str(done)},
        ready if whole else f"{done}: send to the operator, who answers with a signed file",
    )


@app.command()
def sign(
    request: Annotated[Path, typer.Argument(help="A site's request.")],
    federation: Folder = _HERE,
    as_json: AsJson = False,
) -> None:
    """At the operator: check a site's request and certify its key."""
    from fednano.deploy.provision import sign as make

    signed = str(make(federation, request))
    _say(as_json, {"signed": signed}, f"{signed}: send back to the site")


@app.command()
def renew(
    federation: Folder = _HERE,
    bundle: Annotated[Path | None, typer.Option(help="At a site: its bundle.")] = None,
    as_json: AsJson = False,
) -> None:
    """New TLS key and certificate: of the server, or with --bundle of a site (then a request for the operator)."""
    from fednano.deploy.enrolment import renew_site
    from fednano.deploy.provision import renew_server

    if bundle is not None:
        request = str(renew_site(bundle))
        _say(
            as_json, {"request": request}, f"{request}: send to the operator, who answers with a signed file"
        )
        return
    renew_server(federation)
    path = str(federation / "server" / "server.crt")
    _say(as_json, {"certificate": path}, f"{path}: counts when `fednano server up` is started anew")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="Name of the site.")],
    federation: Folder = _HERE,
    as_json: AsJson = False,
) -> None:
    """Shut a site out, at once: its certificates, tokens and node key are worth nothing any more."""
    from fednano.deploy.provision import revoke as shut

    shut(federation, site)
    back = f"{site} is revoked. If it may come back, with new keys: fednano deploy invite {site}"
    _say(as_json, {"site": site, "state": "revoked"}, back)


@app.command()
def sites(
    federation: Folder = _HERE,
    as_json: AsJson = False,
) -> None:
    """List the sites, whether they are enrolled, and until when their certificates hold."""
    from fednano.security.place import ServerPlace

    rows: list[dict[str, Any]] = []
    for site in ServerPlace(federation / "server").sites().values():
        state = "revoked" if site.revoked else "enrolled" if site.serial else "invited"
        rows.append({"site": site.name, "state": state, "expires": site.expires, "serial": site.serial})
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        typer.echo(f"{row['site']:<24} {row['state']:<9} {row['expires']}".rstrip())


def _node_config(data: str, partition: str, models: str) -> dict[str, str | int]:
    """What the SuperNode tells its client about its data and its model. Raises ConfigError."""
    if data and partition:
        raise ConfigError("give --data or --partition, not both.")
    for option, folder in (("--data", data), ("--models", models)):
        if folder and not Path(folder).is_dir():
            raise ConfigError(f"{option} is {folder!r}, which is no folder.")
    held: dict[str, str | int] = {"models": str(Path(models).absolute())} if models else {}
    if data:
        return {"data": str(Path(data).absolute()), **held}
    if not partition:
        return held
    part, _, count = partition.partition("/")
    if not (part.isdigit() and count.isdigit() and int(part) < int(count)):
        raise ConfigError(f"--partition is {partition!r}; expected K/N, such as 0/3.")
    return {"partition-id": int(part), "num-partitions": int(count), **held}


@app.command()
def edge(
    model: Annotated[str, typer.Argument(help="As [host] in the plan has it: 'tiny', a folder, or an id.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make.")],
    head: Annotated[bool, typer.Option(help="With the head, for `--exchange label-private`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the client's part of a model, for sites that hold no layer of the language model."""
    from fednano.models.client_part import write_client_part
    from fednano.runs.text import format_bytes

    manifest = write_client_part(model, folder, head=head)
    size = format_bytes(int(manifest["bytes"]))
    _say(
        as_json,
        manifest,
        f"{folder}: {size} for the sites, who name it with `fednano deploy enroll --models`",
    )


@app.command()
def render(
    kind: Annotated[str, typer.Argument(metavar="FORMAT", help="'systemd', 'compose' or 'kubernetes'.")],
    plan: Annotated[Path, typer.Argument(help="The federation.toml.")] = Path("federation.toml"),
    federation: Folder = _HERE,
    out: Annotated[Path | None, typer.Option(help="Folder to write; printed without it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write unit files that start the server and the sites with the machine."""
    from fednano.deploy.plan import Plan
    from fednano.deploy.render import render as make

    files = make(Plan.read(plan), kind, federation)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text)
    if as_json:
        typer.echo(
            json.dumps({str(out / name) if out else name: text for name, text in files.items()}, indent=1)
        )
        return
    for name, text in files.items():
        typer.echo(f"# {name}\n{text}" if out is None else out / name)
