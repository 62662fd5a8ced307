"""`fednano unlearn`, after the commit: check it, hand out its receipt, purge what is left, roll it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fednano.cli.unlearn_common import (
    AsJson,
    JobId,
    RunName,
    RunsDir,
    ServerKey,
    app,
    open_desk,
    operator,
    print_out,
    show_job,
)
from fednano.errors import ConfigError, JobStateError, ReceiptInvalid

__all__ = ["purge", "purge_status", "receipt", "rollback", "verify"]


@app.command()
def verify(
    job: JobId,
    key: Annotated[str, typer.Option(help="The server's public key; by default the run's own.")] = "",
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Check a committed job against what is on disk: receipt, log, tombstones, adapter. Code 6 where it is wrong."""
    from fednano.security.keys import load_public
    from fednano.unlearning.jobs.views import check_job

    desk = open_desk(run, runs_dir)
    public = load_public(key or desk.place.root / "server.pub")
    rows = check_job(desk.place, desk.store.job(job), public)
    lines = "\n".join(f"{'ok ' if r['holds'] else 'BAD'}  {r['check']}  {r['note']}".rstrip() for r in rows)
    print_out({"job": job, "holds": all(row["holds"] for row in rows), "checks": rows}, lines, as_json)
    wrong = [row["check"] for row in rows if not row["holds"]]
    if wrong:
        raise ReceiptInvalid(f"job {job}: it does not hold that {'; that '.join(wrong)}.")


@app.command()
def receipt(
    job: JobId,
    out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None,
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print the file's own bytes.")] = False,
) -> None:
    """Print a committed job's receipt, or copy it to a file."""
    desk = open_desk(run, runs_dir)
    state, path = desk.store.job(job).state.value, desk.place.receipt(job)
    if not path.is_file():
        raise JobStateError(f"job {job} is {state} and has no receipt; a job gets one when it is committed.")
    content = path.read_bytes()
    if out is not None:
        out.write_bytes(content)
        typer.echo(str(out))
    else:
        text = content.decode()
        typer.echo(text if as_json else json.dumps(json.loads(text), indent=1), nl=not as_json)


@app.command("verify-receipt")
def check_receipt(
    file: Annotated[Path, typer.Argument(help="The receipt.")],
    key: Annotated[str, typer.Option(help="The server's public key: PEM file or 64 hexadecimal characters.")],
    log: Annotated[
        Path | None, typer.Option(help="The run's log.jsonl, to check that it stands there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a receipt offline, with nothing but the server's public key."""
    from fednano.security.keys import load_public
    from fednano.unlearning.jobs.receipt import verify_receipt

    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    body = verify_receipt(content, load_public(key), log=log)
    text = f"valid: job {body['job']} of run {body['run']}, {body['scope']['samples']} samples, {body['committed']}"
    print_out({"valid": True, "in_log": log is not None, "receipt": body}, text, as_json)


@app.command("purge-status")
def purge_status(
    job: JobId, run: RunName = "latest", runs_dir: RunsDir = "runs", as_json: AsJson = False
) -> None:
    """List what descends from the adapters that knew a job's samples, and what became of it."""
    from fednano.unlearning.jobs.purge import inventory

    _items(inventory(open_desk(run, runs_dir).place, job), as_json)


@app.command()
def purge(
    job: JobId,
    mode: Annotated[
        str, typer.Option(help="'quarantine' (rollback brings it back) or 'delete'.")
    ] = "quarantine",
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """Quarantine or delete what descends from the adapters that knew a job's samples."""
    from fednano.unlearning.jobs.purge import purge as carry_out

    place = open_desk(run, runs_dir).place
    _items(carry_out(place, job, mode, place.server_key(server_key), actor=operator()), as_json)


@app.command()
def rollback(
    job: JobId,
    reason: Annotated[str, typer.Option(help="Why.")] = "",
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """Put the adapter of before a committed job back; possible until it is purged by deletion."""
    from fednano.unlearning.jobs.commit import roll_back

    desk = open_desk(run, runs_dir)
    signer = desk.place.server_key(server_key)
    for each in roll_back(desk, job, signer, actor=operator(), reason=reason):
        show_job(desk, each, as_json)


def _items(items: list[Any], as_json: bool) -> None:
    rows = [vars(item) for item in items]
    text = "\n".join(
        f"{r['status']:<12} {r['kind']:<10} {r['bytes']:>10,}  {r['what']}  ({r['why']})" for r in rows
    )
    print_out(rows, text or "nothing descends from them", as_json)
