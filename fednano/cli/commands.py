"""The commands. Each is a thin layer over a function of the library with the same name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperCommand

from fednano import __version__
from fednano.cli.audit import app as audit_app
from fednano.cli.bench import app as bench_app
from fednano.cli.compare import compare
from fednano.cli.dashboard import dashboard
from fednano.cli.deploy import app as deploy_app
from fednano.cli.doctor import doctor
from fednano.cli.evaluate import app as evaluate_app
from fednano.cli.init import init
from fednano.cli.lists import adapters, strategies
from fednano.cli.nodes import client_app, server_app
from fednano.cli.nodes import run as run_command
from fednano.cli.nodes import status as status_command
from fednano.cli.options import settings_options
from fednano.cli.privacy import app as privacy_app
from fednano.cli.unlearn import app as unlearn_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Federated adapter tuning for multimodal LLMs, with the LLM on the server.",
)
app.add_typer(audit_app, name="audit")
app.add_typer(bench_app, name="bench")
app.add_typer(client_app, name="client")
app.add_typer(server_app, name="server")
app.command("run")(settings_options(run_command))
app.command("status")(status_command)
app.add_typer(deploy_app, name="deploy")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(privacy_app, name="privacy")
app.add_typer(unlearn_app, name="unlearn")
app.command()(compare)
app.command()(dashboard)
app.command()(doctor)
app.command()(init)
app.command()(adapters)
app.command()(strategies)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"fednano {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@settings_options
def simulate(
    *,
    backend: Annotated[
        str,
        typer.Option(
            help="'ray': Flower's simulation engine; 'inprocess': one client at a time, no start-up"
        ),
    ] = "ray",
    progress: Annotated[str, typer.Option(help="'auto', 'live', 'plain' or 'quiet'")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's summary as JSON at the end.")
    ] = False,
    verbose: Annotated[bool, typer.Option(help="Show Flower's own log.")] = False,
    settings: dict[str, Any],
) -> None:
    """Tune adapters over simulated clients on this machine, and report."""
    from fednano.federation.config import RunConfig, check_backend
    from fednano.runs import make_view

    # Everything that can be said without loading torch is said before.
    check_backend(backend)
    config = RunConfig.from_mapping(settings)
    view = make_view("quiet" if as_json else progress)
    from fednano.federation.simulation import simulate as run

    path = run(config, backend=backend, view=view, verbose=verbose)
    if as_json:
        typer.echo((path / "summary.json").read_text())


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="A run's id or folder, or 'latest'.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="An image file to ask about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
    untuned: Annotated[bool, typer.Option(help="Ask the model as it was before tuning.")] = False,
    runs_dir: Annotated[str, typer.Option(help="Folder of the run folders.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print question and answer as JSON.")] = False,
) -> None:
    """Ask a tuned model."""
    from fednano.runs import RunFolder

    path = str(RunFolder.open(run, root=runs_dir).path)
    from fednano.federation.answer import answer

    text = answer(
        path, question, image=image, max_new_tokens=max_new_tokens, untuned=untuned, runs_dir=Path(runs_dir)
    )
    typer.echo(json.dumps({"question": question, "answer": text}) if as_json else text)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run's id or folder, or 'latest'.")] = "latest",
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            help="'peft', 'merged' or 'safetensors'; the README written with it says how to use it",
        ),
    ] = "peft",
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; export/FORMAT in the run by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="For 'peft': rank of the exported LoRA.")] = None,
    runs_dir: Annotated[str, typer.Option(help="Folder of the run folders.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a tuned adapter for other tools."""
    from fednano.runs import RunFolder

    path = str(RunFolder.open(run, root=runs_dir).path)
    from fednano.exporting import export_run

    done = export_run(path, kind, out=out, rank=rank, runs_dir=Path(runs_dir))
    if as_json:
        sites = [{"site": site.site, "rank": site.rank, "error": site.error} for site in done.sites]
        typer.echo(json.dumps({"folder": str(done.folder), "format": done.kind, "sites": sites}))
        return
    for site in done.sites:
        typer.echo(str(site))
    typer.echo(str(done.folder))


class _AsTheyAre(TyperCommand):
    """Hands its words on whole: click would take out the ``--`` that `fednano host bench` needs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Leaves all words to the program."""
        ctx.args = list(args)
        return ctx.args


@app.command(cls=_AsTheyAre)
def host(context: typer.Context) -> None:
    """Serve the frozen language model to the clients of runs. `fednano host --help` lists the options."""
    from fednano.host.cli import main as serve

    sys.exit(serve(list(context.args)))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's id or folder, or 'latest'.")] = "latest",
    runs_dir: Annotated[str, typer.Option(help="Folder of the run folders.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print the path as JSON.")] = False,
) -> None:
    """Write a run's report.html again from its files, and print its path."""
    from fednano.runs import RunFolder
    from fednano.runs.report import render_report

    path = str(render_report(RunFolder.open(run, root=runs_dir).path))
    typer.echo(json.dumps({"report": path}) if as_json else path)
