"""`fednano dashboard`: runs as a web page that follows them."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["dashboard"]


def dashboard(
    runs_dir: Annotated[
        str, typer.Option("--runs-dir", "--runs", help="Folder of the run folders.")
    ] = "runs",
    port: Annotated[int, typer.Option(help="Port to serve at; 0 takes a free one.")] = 8642,
    bind: Annotated[
        str,
        typer.Option(help="Address to serve at. There is no login: whoever reaches it can read every run."),
    ] = "127.0.0.1",
    host_metrics: Annotated[
        str,
        typer.Option(
            help="Show a language host's load from its Prometheus endpoint, such as http://127.0.0.1:9464/metrics."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> None:
    """Serve a web page that shows the runs of a folder as they go on, until Ctrl-C."""
    from fednano.board import dashboard as serve

    def ready(url: str) -> None:
        typer.echo(json.dumps({"url": url, "runs": runs_dir}) if as_json else f"{url}  (Ctrl-C ends it)")

    serve(runs_dir, port=port, bind=bind, host_metrics=host_metrics, ready=ready)
