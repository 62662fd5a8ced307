"""What the commands of `fednano unlearn` share: options, and how jobs are shown."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fednano.errors import ConfigError

if TYPE_CHECKING:
    from fednano.unlearning.jobs.desk import Desk
    from fednano.unlearning.jobs.job import Job

__all__ = [
    "AsJson",
    "DataFolders",
    "JobId",
    "RunName",
    "RunsDir",
    "ServerKey",
    "app",
    "data_folders",
    "job_line",
    "open_desk",
    "operator",
    "print_out",
    "show_job",
]

app = typer.Typer(
    no_args_is_help=True,
    help="Requests to forget, from a site's signature to the server's receipt.",
    rich_markup_mode=None,
)

RunName = Annotated[str, typer.Option("--run", help="A run's id or folder, or 'latest'.")]
RunsDir = Annotated[str, typer.Option(help="Folder of the run folders.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(help="A job's id, such as u0001.")]
ServerKey = Annotated[
    Path | None,
    typer.Option(help="The server's private key; by default the run's own, made at its first use."),
]
DataFolders = Annotated[
    list[str] | None,
    typer.Option("--data", help="SITE=FOLDER: a real site's own data, where this machine may read it."),
]


_FIGURES = ("ihl", "retain_loss", "el", "ma", "utility")


def open_desk(run: str, runs_dir: str, data: list[str] | None = None) -> Desk:
    """The desk of a run that is given by id or folder. Raises RunError where there is none."""
    from fednano.runs import RunFolder
    from fednano.unlearning.jobs.desk import Desk
    from fednano.unlearning.jobs.holdings import RunHoldings
    from fednano.unlearning.jobs.place import Place

    folder = RunFolder.open(run, root=runs_dir)
    own = data_folders(data)
    return Desk(Place(folder), lambda: RunHoldings(folder.path, own))


def data_folders(data: list[str] | None) -> dict[str, Path]:
    """``SITE=FOLDER`` options as a mapping. Raises ConfigError for anything else."""
    pairs = dict(pair.partition("=")[::2] for pair in data or [])
    if any(not name or not path for name, path in pairs.items()):
        raise ConfigError(f"--data is {data}; expected SITE=FOLDER.")
    return {name: Path(path) for name, path in pairs.items()}


def operator() -> str:
    """Who works this command line, for the record."""
    try:
        return f"operator:{getpass.getuser()}"
    except (OSError, KeyError, ImportError):
        return "operator"


def job_line(job: Job, rounds: list[dict[str, Any]]) -> str:
    """A job in one line, with its newest round while it runs."""
    words = [job.id, job.state.value]
    if rounds and job.state.value == "running":
        last = rounds[-1]
        words.append(f"round {last['number']}/{last['of']}")
        words += [f"{name} {last[name]:.4f}" for name in _FIGURES if last.get(name) is not None]
    return "  ".join([*words, job.note, "OVERDUE" if job.overdue() else ""]).rstrip()


def show_job(desk: Desk, job: Job, as_json: bool, extra: dict[str, Any] | None = None) -> None:
    """Print one job: as JSON, or in a few lines for people."""
    from fednano.unlearning.jobs.receipt import NOT_AVAILABLE
    from fednano.unlearning.jobs.views import details, note

    body = {**details(desk, job), **(extra or {})}
    if as_json:
        typer.echo(json.dumps(body, indent=1))
        return
    typer.echo(job_line(job, body["rounds"]))
    typer.echo(f"  {body['samples']} samples ({body['scope']}) of {job.site}; {body['request']['reason']}")
    given, needed = [each["name"] for each in body["approvals"]["given"]], body["approvals"]["needed"]
    if needed:
        typer.echo(f"  approvals: {len(given)} of {needed} {' '.join(given)}")
    for each in body["rounds"]:
        figures = [f"{name} {each[name]:.4f}" for name in _FIGURES if each.get(name) is not None]
        typer.echo(f"  round {each['number']}/{each['of']}  {'  '.join(figures)}")
    for name, found in (body["facts"].get("probes") or {}).items():
        held = (
            NOT_AVAILABLE if found is None else f"{'BACK' if found.get('back') else 'holds'}  {note(found)}"
        )
        typer.echo(f"  probe {name:<11} {held}")
    for alarm in body["alarms"]:
        typer.echo(
            f"  ALARM  {alarm['time']}  run {alarm['run']}, round {alarm['round']}: known again, exact memorisation "
            f"{alarm['exact_memorisation']:.3f} over {alarm['level']:.3f}"
        )
    for move in body["history"]:
        typer.echo(f"  {move['time']}  {move['target']:<11} {move['actor']}  {move['note']}".rstrip())


def print_out(value: Any, text: str, as_json: bool) -> None:
    """Print ``value`` as JSON, or ``text``."""
    typer.echo(json.dumps(value, indent=1) if as_json else text)
