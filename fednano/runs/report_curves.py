"""The charts over rounds: accuracy, training loss, test loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fednano.runs.charts import Series, legend, line_chart
from fednano.runs.report_metrics import MAIN, Metrics
from fednano.runs.text import format_percent, phase_title

__all__ = ["curves"]


def curves(metrics: Metrics, metric: str = "Accuracy") -> list[dict[str, Any]]:
    """The charts over rounds: accuracy, training loss, test loss; each as title, remark, chart and legend."""
    order = sorted(metrics.phases, key=lambda phase: phase != MAIN)
    trained = [phase for phase in order if metrics.rounds.get(phase)]
    zero = metrics.accuracy.get("zero_shot", {})
    charts = []
    accuracy = _series(trained, metrics.accuracy, start=zero.get(0))
    if zero and trained:
        last = max(metrics.rounds[phase] for phase in trained)
        level = zero[max(zero)]
        accuracy.append(Series("Zero-shot", [(0, level), (last, level)], colour=13, dashed=True))
    if trained and any(metrics.accuracy.get(phase) for phase in trained):
        charts.append(_curve(metric, _judged_on(metrics, metric), accuracy, format_percent, (0, 1)))
    train = _series(trained, metrics.train_loss, bands=metrics.spread)
    if train:
        text = "Mean over clients while they train, weighted by samples."
        if any(line.band for line in train):
            text += " The band spans the clients, lowest to highest."
        charts.append(_curve("Training loss", text, train, _loss, (0, math.inf)))
    start = metrics.test_loss.get("zero_shot", {}).get(0)
    test = _series(trained, metrics.test_loss, start=start)
    if test:
        charts.append(
            _curve(
                "Test loss", "Mean loss of the right answers on test questions.", test, _loss, (0, math.inf)
            )
        )
    return charts


def _judged_on(metrics: Metrics, metric: str) -> str:
    """How many test questions stand behind the points, where the log tells."""
    what = "Exact matches" if metric == "Accuracy" else metric
    each, whole = metrics.judged.get(metrics.main or "", (None, None))
    if each and whole and whole > each:
        return f"{what}: each round on {each:,} test questions, the last one on all {whole:,}."
    size = whole or each
    if not size:
        return f"{'Share of exact matches' if metric == 'Accuracy' else metric} on test questions."
    return f"{what} on {size:,} test questions."


def _series(
    phases: list[str],
    table: Mapping[str, Mapping[int, float]],
    *,
    start: float | None = None,
    bands: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
) -> list[Series]:
    lines = []
    for number, phase in enumerate(phases):
        points = dict(table.get(phase, {}))
        if not points:
            continue
        if start is not None:
            points.setdefault(0, start)
        # one band only: several on top of each other cannot be told apart
        spread = (bands or {}).get(phase, {}) if number == 0 else {}
        band = [(float(x), low, high) for x, (low, high) in sorted(spread.items())]
        lines.append(
            Series(
                phase_title(phase),
                [(float(x), y) for x, y in sorted(points.items())],
                colour=number,
                band=band,
            )
        )
    return lines


def _curve(
    title: str, remark: str, lines: list[Series], write: Callable[[float], str], limits: tuple[float, float]
) -> dict[str, Any]:
    ends = "; ".join(
        f"{line.name} from {write(line.points[0][1])} to {write(line.points[-1][1])}"
        for line in lines
        if line.points
    )
    svg = line_chart(
        lines,
        title=title,
        description=f"{remark} {ends}.",
        x_label="round",
        y_format=write,
        tick_format=lambda value: f"{100 * value:.3g} %" if write is format_percent else write(value),
        y_limits=limits,
    )
    return {
        "title": title,
        "remark": remark,
        "svg": svg,
        "legend": legend([(line.name, line.colour) for line in lines]),
    }


def _loss(value: float) -> str:
    return f"{value:.3g}"
