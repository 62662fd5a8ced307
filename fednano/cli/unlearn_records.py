"""`fednano unlearn`, after the commit: check it, hand out its receipt, purge what is left, roll it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fednano.cli.unlearn_common import (
    AsJson,
    DataFolders,
    JobId,
    RunName,
    RunsDir,
    ServerKey,
    app,
    data_folders,
    open_desk,
    operator,
    print_out,
    show_job,
)
from fednano.errors import ConfigError, JobStateError, ReceiptInvalid

if TYPE_CHECKING:
    from fednano.unlearning.jobs.desk import Desk

__all__ = ["purge", "purge_status", "receipt", "report", "rollback", "verify"]


@app.command()
def verify(
    job: JobId,
    key: Annotated[str, typer.Option(help="The server's public key; by default the run's own.")] = "",
    probe: Annotated[
        str,
        typer.Option(
            help="Also look harder for the samples: relearning, int8, int4, paraphrase, image-only, text-only (with "
            "commas). What is found is signed, logged and shown with the job."
        ),
    ] = "",
    paraphrases: Annotated[
        Path | None,
        typer.Option(
            help='With --probe paraphrase: JSON Lines of {"id", "question"}, questions in other words.'
        ),
    ] = None,
    data: DataFolders = None,
    server_key: ServerKey = None,
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Check a committed job against what is on disk: receipt, log, tombstones, adapter. Code 6 where it is wrong.

    With --probe also against the samples, where their owner still holds them; code 6 where a probe brings them back.
    """
    from fednano.security.keys import load_public
    from fednano.unlearning.jobs.views import check_job, note
    from fednano.unlearning.probes import check_probes

    desk = open_desk(run, runs_dir)
    names = check_probes(probe) if probe else ()
    if paraphrases is not None and "paraphrase" not in names:
        raise ConfigError("--paraphrases goes with --probe paraphrase.")
    public = load_public(key or desk.place.root / "server.pub")
    rows = check_job(desk.place, desk.store.job(job), public)
    found: dict[str, Any] = {}
    if names and all(row["holds"] for row in rows):
        found = _probed(desk, job, names, paraphrases, data, server_key)
        rows += [
            {
                "check": f"the probe {name!r} does not bring the samples back",
                "holds": not each["back"],
                "note": note(each),
            }
            for name, each in found.items()
            if each is not None and "back" in each
        ]
    lines = "\n".join(f"{'ok ' if r['holds'] else 'BAD'}  {r['check']}  {r['note']}".rstrip() for r in rows)
    body = {"job": job, "holds": all(row["holds"] for row in rows), "checks": rows}
    print_out(body | ({"probes": found} if names else {}), lines, as_json)
    wrong = [row["check"] for row in rows if not row["holds"]]
    if wrong:
        raise ReceiptInvalid(f"job {job}: it does not hold that {'; that '.join(wrong)}.")


def _probed(
    desk: Desk,
    job: str,
    names: tuple[str, ...],
    paraphrases: Path | None,
    data: list[str] | None,
    server_key: Path | None,
) -> dict[str, Any]:
    from fednano.unlearning.jobs.evidence import add_evidence, probe_committed

    current = desk.store.job(job)
    other = _wordings(paraphrases) if paraphrases is not None else {}
    found = probe_committed(desk.place, current, names, data=data_folders(data), paraphrases=other)
    add_evidence(desk.place, current, found, desk.place.server_key(server_key))
    return found


def _wordings(path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                found[str(row["id"])] = (*found.get(str(row["id"]), ()), str(row["question"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{path} cannot be read ({error!r}); expected JSON Lines of {{"id", "question"}}.'
        ) from error
    if not found:
        raise ConfigError(f'{path} is empty; expected JSON Lines of {{"id", "question"}}.')
    return found


@app.command()
def report(
    job: JobId,
    out: Annotated[Path | None, typer.Option(help="Write it there instead of beside the receipts.")] = None,
    run: RunName = "latest",
    runs_dir: RunsDir = "runs",
    as_json: AsJson = False,
) -> None:
    """Write a job's page: verdict, what was asked, curves, before and after, probes, the receipt's hash."""
    from fednano.unlearning.jobs.report import write_job_report

    path = write_job_report(open_desk(run, runs_dir), job, out)
    print_out({"job": job, "report": str(path)}, str(path), as_json)


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
