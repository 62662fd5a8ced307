"""Several runs side by side: what they reached, what it cost, and in which settings they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednano.errors import RunError
from fednano.evaluation import TITLES
from fednano.runs.atomic import write_bytes
from fednano.runs.charts import Series, bar, legend, line_chart
from fednano.runs.folder import RunFolder
from fednano.runs.report import page
from fednano.runs.report_data import ReportData, collect
from fednano.runs.report_sections import interval
from fednano.runs.text import format_bytes, format_count, format_percent, format_seconds

__all__ = ["Comparison", "Row", "compare_runs", "comparison_html", "write_comparison"]

_IGNORED = {"created", "command", "runs-dir", "cache-dir", "resume"}


@dataclass(frozen=True)
class Row:
    """One figure of every run.

    Attributes:
        name: what it is.
        values: one for each run, None where a run does not tell.
        shown: the same, written.
        better: ``"high"``, ``"low"``, or empty where neither is better.
    """

    name: str
    values: tuple[float | None, ...]
    shown: tuple[str, ...]
    better: str = ""

    @property
    def best(self) -> set[int]:
        """Places of the best runs; empty where all are equal or nothing is better."""
        known = [value for value in self.values if value is not None]
        if not self.better or len(known) < 2 or min(known) == max(known):
            return set()
        wanted = max(known) if self.better == "high" else min(known)
        return {place for place, value in enumerate(self.values) if value == wanted}


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: ids of the runs, ``(n,)``, n >= 2.
        rows: figures.
        settings: settings that differ, with each run's value.
        cautions: why some figures do not compare.
        runs: what the runs' folders hold.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    cautions: tuple[str, ...]
    runs: tuple[ReportData, ...]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {
            "runs": list(self.names),
            "figures": {row.name: dict(zip(self.names, row.values, strict=True)) for row in self.rows},
            "settings": {name: dict(zip(self.names, values, strict=True)) for name, values in self.settings},
            "cautions": list(self.cautions),
        }


def compare_runs(runs: Sequence[RunFolder]) -> Comparison:
    """Compare finished runs.

    Raises:
        RunError: fewer than two runs, one twice, or one without a summary.
    """
    names = tuple(run.id for run in runs)
    if len(names) < 2 or len(set(names)) != len(names):
        raise RunError(f"comparing needs two runs or more, each once; got {', '.join(names) or 'none'}.")
    found = tuple(collect(run) for run in runs)
    for data in found:
        if data.summary is None:
            raise RunError(
                f"run {data.run_id} has no outcome: {data.missing.get('summary', 'it is not finished')} Finish it with "
                f"fednano simulate --resume {data.run_id}."
            )
    keys = sorted({key for data in found for key in data.config} - _IGNORED)
    settings = tuple(
        (key, values)
        for key in keys
        if len(set(values := tuple(_setting(data.config.get(key)) for data in found))) > 1
    )
    return Comparison(names, tuple(_rows(found)), settings, tuple(_cautions(found)), found)


def _setting(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _rows(runs: Sequence[ReportData]) -> list[Row]:
    summaries = [data.summary for data in runs if data.summary is not None]

    def row(
        name: str, read: Callable[[Any], Any], write: Callable[[float], str], better: str = ""
    ) -> Row | None:
        values = tuple(read(summary) for summary in summaries)
        if all(value is None for value in values):
            return None
        shown = tuple("–" if value is None else write(value) for value in values)
        return Row(name, values, shown, better)

    title = TITLES[summaries[0].metric] if len({s.metric for s in summaries}) == 1 else "Score"
    phases = list(dict.fromkeys(phase for summary in summaries for phase in summary.accuracy))
    found = []
    for phase in phases:
        name = f"{title}, {phase.replace('_', ' ')}"
        found.append(row(name, _reader("accuracy", phase), format_percent, "high"))
    others = dict.fromkeys(
        name for s in summaries for name in s.scores.get("federated", {}) if name != s.metric
    )
    for metric in others:
        name, read = (
            f"{TITLES.get(metric, metric.capitalize())}, federated",
            _reader("scores", "federated", metric),
        )
        if metric == "perplexity":
            found.append(row(name, read, "{:.2f}".format, "low"))
        else:
            found.append(row(name, read, format_percent, "high"))
    found += [
        row(
            f"{title}, worst client",
            lambda s: (s.extra.get("on_clients") or {}).get("low"),
            format_percent,
            "high",
        ),
        row(
            "Spread over clients",
            lambda s: (s.extra.get("on_clients") or {}).get("deviation"),
            format_percent,
            "low",
        ),
        row("Rounds", lambda s: s.rounds, lambda v: f"{v:.0f}"),
        row("Clients", lambda s: s.clients, lambda v: f"{v:.0f}"),
        row("Trained parameters", lambda s: s.parameters["trainable"], format_count, "low"),
        row("Adapters on the wire", lambda s: s.bytes.get("adapter_total"), format_bytes, "low"),
        row("Activations on the wire", lambda s: s.bytes.get("activation_total"), format_bytes, "low"),
        row("Wall time", lambda s: s.wall_seconds, format_seconds, "low"),
    ]
    return [each for each in found if each is not None]


def _reader(field: str, *keys: str) -> Callable[[Any], Any]:
    """Read a summary's mapping; None where a key is missing."""

    def read(summary: Any) -> Any:
        value = getattr(summary, field)
        for key in keys:
            value = (value or {}).get(key)
        return value

    return read


def _cautions(runs: Sequence[ReportData]) -> list[str]:
    summaries = [data.summary for data in runs if data.summary is not None]
    found = []
    for name, what in (("dataset", "data sets"), ("metric", "metrics"), ("model", "models")):
        values = list(dict.fromkeys(str(getattr(summary, name)) for summary in summaries))
        if len(values) > 1:
            found.append(
                f"The runs have different {what} ({', '.join(values)}): their scores do not compare."
            )
    if len({summary.test_samples for summary in summaries}) > 1:
        found.append("The runs were judged on different numbers of test samples.")
    if len({summary.seed for summary in summaries}) == 1 and len(summaries) > 1:
        found.append("All runs have the same seed: a difference between them may be one of the draw.")
    known = [s for s in summaries if s.test_samples]
    ends = [interval(s.accuracy["federated"], s.test_samples or 1) for s in known]
    if len(ends) == len(summaries) and max(low for low, _ in ends) <= min(high for _, high in ends):
        found.append(
            "The 95 % intervals of the scores overlap: this many test samples do not tell the runs apart."
        )
    return found


def comparison_html(found: Comparison) -> str:
    """The page: self-contained, as a run's report is."""
    return page("compare.html.j2", found=found, bars=_bars(found), charts=_charts(found))


def write_comparison(found: Comparison, path: Path) -> Path:
    """Write the page. Raises RunError."""
    write_bytes(path, comparison_html(found).encode("utf-8", "replace"))
    return path


def _bars(found: Comparison) -> list[dict[str, Any]]:
    rows = []
    for number, data in enumerate(found.runs):
        assert data.summary is not None
        score, count = data.summary.accuracy["federated"], data.summary.test_samples
        low, high = interval(score, count) if count else (math.nan, math.nan)
        rows.append(
            {
                "name": data.run_id,
                "value": format_percent(score),
                "interval": f"{format_percent(low)} to {format_percent(high)}" if count else "",
                "bar": bar(
                    score,
                    hover=f"{data.run_id}: {format_percent(score)}",
                    number=number,
                    marker=data.summary.accuracy["zero_shot"],
                ),
            }
        )
    return rows


def _charts(found: Comparison) -> list[dict[str, Any]]:
    charts = []
    for title, table, percent in (
        ("Score on test samples", "accuracy", True),
        ("Training loss", "train_loss", False),
        ("Test loss", "test_loss", False),
    ):
        lines = []
        for number, data in enumerate(found.runs):
            points = getattr(data.metrics, table).get(data.metrics.main or "", {})
            if points:
                where = [(float(x), y) for x, y in sorted(points.items())]
                lines.append(Series(data.run_id, where, colour=number))
        if not lines:
            continue
        write = format_percent if percent else lambda value: f"{value:.3g}"
        svg = line_chart(
            lines,
            title=title,
            description=f"{title} over the rounds of {len(lines)} runs.",
            x_label="round",
            y_format=write,
            y_limits=(0, 1) if percent else (0, math.inf),
        )
        charts.append(
            {"title": title, "svg": svg, "legend": legend([(line.name, line.colour) for line in lines])}
        )
    return charts
