"""``report.html``: one self-contained page about a run, made from the files of its folder alone.

The page holds its style, charts and pictures; it loads nothing, runs no script, and its content security policy
forbids both. Whatever comes from data (questions, answers, client names, refusals) is escaped.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fednano.evaluation import TITLES
from fednano.runs.atomic import write_bytes
from fednano.runs.folder import RunFolder
from fednano.runs.report_data import ReportData, collect
from fednano.runs.report_metrics import Client
from fednano.runs.text import format_percent, phase_title

__all__ = ["page", "render_report", "report_html"]

NAME = "report.html"


def render_report(run: str | Path | RunFolder) -> Path:
    """Write the report of a run.

    Files that are missing or damaged become a sentence in the page. The same folder gives the same bytes.

    Args:
        run: the run folder.

    Returns:
        Path of ``report.html`` in the run folder.

    Raises:
        RunError: the folder is no run folder, or the page cannot be written.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    path = folder.file(NAME)
    write_bytes(path, report_html(collect(folder)).encode("utf-8", "replace"))
    return path


def report_html(data: ReportData) -> str:
    """The page.

    Args:
        data: what the run folder holds.
    """
    from fednano.runs import report_extra as extra
    from fednano.runs import report_sections as sections
    from fednano.runs.report_curves import curves

    title = TITLES[data.summary.metric] if data.summary else "Accuracy"
    outcomes = [prediction.outcome for prediction in data.predictions]
    return page(
        "report.html.j2",
        data=data,
        summary=data.summary,
        missing=data.missing,
        verdict=sections.verdict(data),
        tiles=sections.tiles(data),
        phases=sections.phase_rows(data.summary) if data.summary else [],
        curves=curves(data.metrics, title),
        clients=_client_rows(data.metrics.clients),
        planes=sections.plane_rows(data.metrics),
        wire=sections.wire_sentences(data),
        partition=sections.partition_rows(data.partition) if data.partition else None,
        heat=extra.client_heat(data.metrics),
        spectrum=extra.spectrum_rows(data.spectrum),
        privacy=extra.privacy_rows(data.config, data.summary),
        title=title,
        scores=_scores(data),
        outcomes={name: outcomes.count(name) for name in ("fixed", "kept", "broken", "wrong")},
        main=data.metrics.main,
        settings=_settings(data.config),
        command=data.config.get("command"),
    )


def page(template: str, **content: Any) -> str:
    """A self-contained page from one of the package's templates; all content is escaped.

    Args:
        template: its file name.
        content: what it shows; charts are Markup.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    templates = files("fednano.runs") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = format_percent
    environment.filters["phase"] = phase_title
    text: str = environment.get_template(template).render(**content)
    return text


def _scores(data: ReportData) -> list[tuple[str, str, str]]:
    """Every further metric: its title, before and after."""
    if data.summary is None:
        return []
    before, after = (data.summary.scores.get(phase, {}) for phase in ("zero_shot", "federated"))

    def write(name: str, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.2f}" if name == "perplexity" else format_percent(value)

    return [
        (TITLES.get(name, name.capitalize()), write(name, before.get(name)), write(name, score))
        for name, score in after.items()
        if name != data.summary.metric
    ]


def _client_rows(clients: list[Client]) -> list[dict[str, Any]]:
    from fednano.runs.charts import bar

    most = max((client.trained for client in clients), default=0)
    worst = max((client.loss for client in clients if client.loss is not None), default=0.0)
    rows = []
    for client in clients:
        loss, accuracy = client.loss, client.accuracy
        rows.append(
            {
                "client": client,
                "seconds": None if client.seconds is None else _duration(client.seconds),
                "trained": bar(
                    client.trained / most if most else 0,
                    hover=f"{client.name}: {client.trained:,} training samples",
                    number=2,
                ),
                "loss": None
                if loss is None
                else bar(
                    loss / worst if worst > 0 else 0,
                    hover=f"{client.name}: training loss {loss:.4f}",
                    number=1,
                ),
                "accuracy": None
                if accuracy is None
                else bar(accuracy, hover=f"{client.name}: accuracy {format_percent(accuracy)}", number=0),
            }
        )
    return rows


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 0.95 else f"{seconds:.1f} s"


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Settings as text, in the order of the file."""
    rows = []
    for key, value in config.items():
        if key != "command":
            text = str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
            rows.append((key, text))
    return rows
