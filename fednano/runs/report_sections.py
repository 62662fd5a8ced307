"""What the report says, worked out from what was read: sentences, figures and charts. No HTML but the
charts'."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from fednano.evaluation import TITLES
from fednano.runs.charts import bar, legend, stacked_bar
from fednano.runs.report_data import Partition, ReportData
from fednano.runs.report_metrics import MAIN, Metrics
from fednano.runs.summary import Summary
from fednano.runs.text import (
    ZERO_SHOT,
    format_bytes,
    format_count,
    format_percent,
    format_seconds,
    phase_title,
)

__all__ = [
    "Verdict",
    "interval",
    "partition_rows",
    "phase_rows",
    "plane_rows",
    "tiles",
    "verdict",
    "wire_sentences",
]

PLANE_TITLES = {
    "adapter_up": "Adapters, client to server",
    "adapter_down": "Adapters, server to client",
    "activation_up": "Activations, client to host",
    "activation_down": "Gradients and losses, host to client",
}


@dataclass(frozen=True)
class Verdict:
    """The head of the report.

    Attributes:
        before: accuracy before tuning, written, or None.
        after: accuracy after tuning, written, or None.
        change: the difference in points, written, or None.
        direction: ``"up"``, ``"down"``, ``"same"`` or ``"unknown"``.
        sentence: the outcome in words.
        warning: what to know before trusting it, or None.
    """

    before: str | None
    after: str | None
    change: str | None
    direction: str
    sentence: str
    warning: str | None = None


def interval(accuracy: float, samples: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927): what the test set's size allows to say about it.

    Args:
        accuracy: share of right answers, in [0, 1].
        samples: number of test samples, at least 1.

    Returns:
        (low, high), in [0, 1].
    """
    z = 1.959963984540054
    shrink = 1 + z * z / samples
    centre = (accuracy + z * z / (2 * samples)) / shrink
    half = z / shrink * math.sqrt(accuracy * (1 - accuracy) / samples + z * z / (4 * samples * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def verdict(data: ReportData) -> Verdict:
    """The outcome: accuracy before and after."""
    summary = data.summary
    if summary is None:
        return _unfinished(data)
    before, after = summary.accuracy["zero_shot"], summary.accuracy[MAIN]
    points = 100 * (after - before)
    direction = "same" if abs(points) < 0.05 else "up" if points > 0 else "down"
    questions = f" on {summary.test_samples:,} test questions" if summary.test_samples else ""
    moved = {"up": "rose", "down": "fell"}.get(direction)
    change = f"{moved} from {format_percent(before)} to" if moved else "stayed at"
    title = TITLES[summary.metric]
    sentence = (
        f"{summary.clients} clients tuned one model without sharing their data. {title}{questions} {change} "
        f"{format_percent(after)} in {_plural(summary.rounds, 'round')}."
    )
    if summary.test_samples:
        low, high = interval(after, summary.test_samples)
        sentence += (
            f" With this many questions, the tuned model's {title.replace('Accuracy', 'accuracy')} lies between "
            f"{format_percent(low)} and {format_percent(high)} (95 % interval)."
        )
    warning = None
    if summary.status != "complete":
        warning = "The run was interrupted: fewer rounds were done than asked for."
    return Verdict(
        format_percent(before), format_percent(after), f"{points:+.1f} points", direction, sentence, warning
    )


def _unfinished(data: ReportData) -> Verdict:
    main = data.metrics.main
    known = data.metrics.accuracy.get(main or "", {})
    zero = data.metrics.accuracy.get(ZERO_SHOT, {})
    before = format_percent(zero[max(zero)]) if zero else None
    if main is None or not known:
        return Verdict(
            before, None, None, "unknown", "This run has not come to a result.", data.missing.get("summary")
        )
    last = max(known)
    sentence = f"This run has not finished. After round {last} its accuracy was {format_percent(known[last])}"
    sentence += f", against {before} before tuning." if before else "."
    return Verdict(
        before, format_percent(known[last]), None, "unknown", sentence, data.missing.get("summary")
    )


def tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """The main figures, as (value, name, remark)."""
    summary = data.summary
    if summary is None:
        return []
    count, size = summary.parameters, summary.bytes
    share = 100 * count["trainable"] / count["model"] if count["model"] else 0.0
    edge = 100 * count["edge"] / count["model"] if count["model"] else 0.0
    both = size["adapter_up_per_client_round"] + size["adapter_down_per_client_round"]
    step = size["activation_up_per_sample_step"] + size["activation_down_per_sample_step"]
    return [
        (f"{summary.rounds} × {summary.clients}", "rounds × clients", f"merged by {summary.rule}"),
        (
            format_seconds(summary.wall_seconds),
            "wall time",
            "from start to end",
        ),
        (
            format_count(count["trainable"]),
            "trained parameters",
            f"{share:.2g} % of {format_count(count['model'])}",
        ),
        (format_count(count["edge"]), "parameters at each client", f"{edge:.3g} % of the model"),
        (format_bytes(both), "adapters, a client and round", "up and down, as sent"),
        (format_bytes(step), "activations, a sample and step", "up and down, as sent"),
        *_privacy_tile(summary),
    ]


def _privacy_tile(summary: Summary) -> list[tuple[str, str, str]]:
    privacy = summary.extra.get("privacy")
    if not privacy:
        return []
    remark = (
        f"of each {privacy['unit']} at δ = {privacy['delta']:g}, noise by the {privacy['noise_added_by']}"
    )
    return [(f"ε = {privacy['epsilon']:.3g}", "differential privacy", remark)]


def phase_rows(summary: Summary) -> list[dict[str, Any]]:
    """One bar for each phase's accuracy, with a marker at zero-shot."""
    before = summary.accuracy["zero_shot"]
    rows = []
    for name, accuracy in summary.accuracy.items():
        phase = summary.phases.get(name)
        spread = summary.extra.get("spread", {}).get(name.replace("_", "-")) or summary.extra.get(
            "spread", {}
        ).get(name)
        remark = phase.note if phase else ""
        if isinstance(spread, list | tuple) and len(spread) == 2:
            remark += f" ({format_percent(spread[0])} to {format_percent(spread[1])})"
        title = phase_title(name)
        value = format_percent(accuracy)
        rows.append(
            {
                "title": title,
                "value": value,
                "change": "" if name == "zero_shot" else f"{100 * (accuracy - before):+.1f}",
                "remark": remark,
                "main": name == MAIN,
                "seconds": "" if phase is None or phase.seconds is None else format_seconds(phase.seconds),
                "bar": bar(
                    accuracy,
                    hover=f"{title}: {value}",
                    number=0 if name == MAIN else 13,
                    marker=None if name == "zero_shot" else before,
                ),
            }
        )
    return rows


def plane_rows(metrics: Metrics) -> list[dict[str, Any]]:
    """One bar for each plane's bytes in the main phase."""
    planes = metrics.planes.get(metrics.main or "", {})
    total = sum(planes.values())
    largest = max(planes.values(), default=0)
    rows = []
    for plane, count in planes.items():
        title = PLANE_TITLES.get(plane, plane.replace("_", " "))
        share = count / total if total else 0.0
        rows.append(
            {
                "title": title,
                "value": format_bytes(count),
                "exact": f"{count:,} bytes",
                "share": f"{100 * share:.1f} %" if share >= 0.0005 or not count else "< 0.1 %",
                "bar": bar(
                    count / largest if largest else 0.0,
                    hover=f"{title}: {count:,} bytes",
                    number=0 if plane.startswith("activation") else 1,
                ),
            }
        )
    return rows


def wire_sentences(data: ReportData) -> list[str]:
    """Which plane is heavier and by what factor, in words, from the counted bytes."""
    planes = data.metrics.planes.get(data.metrics.main or "", {})
    adapters = sum(count for plane, count in planes.items() if plane.startswith("adapter"))
    activations = sum(count for plane, count in planes.items() if plane.startswith("activation"))
    said = []
    if adapters and activations > adapters:
        said.append(
            f"Activations outweigh adapters on the wire by a factor of {_factor(activations / adapters)}: "
            f"{format_bytes(activations)} of embeddings, losses and gradients went between clients and the language "
            f"host, {format_bytes(adapters)} of adapters between clients and the server. Comparing adapter sizes alone "
            "would leave out most of the traffic."
        )
    elif adapters and activations:
        said.append(
            f"In this run adapters outweigh activations on the wire by a factor of {_factor(adapters / activations)}: "
            f"{format_bytes(adapters)} of adapters, {format_bytes(activations)} of activations."
        )
    elif adapters:
        said.append(
            "No activations crossed the wire: each client ran the whole model by itself. "
            f"Adapters: {format_bytes(adapters)}."
        )
    if data.summary is not None:
        size = data.summary.bytes
        step = size["activation_up_per_sample_step"] + size["activation_down_per_sample_step"]
        both = size["adapter_up_per_client_round"] + size["adapter_down_per_client_round"]
        if step and both:
            said.append(
                f"One sample in one training step moves {format_bytes(step)} of activations; one client in one round "
                f"moves {format_bytes(both)} of adapters, as much as {_factor(both / step)} samples."
            )
    return said


def partition_rows(partition: Partition) -> dict[str, Any]:
    """Stacked bars clients x labels, and the same as a table of counts with shades."""
    largest = max(sum(row) for _, row in partition.counts)
    columns = [sum(row[place] for _, row in partition.counts) for place in range(len(partition.labels))]
    rows = []
    for client, counts in partition.counts:
        cells = [
            {"count": count, "shade": round(100 * count / column) if column else 0}
            for count, column in zip(counts, columns, strict=True)
        ]
        rows.append(
            {
                "client": client,
                "samples": sum(counts),
                "bar": stacked_bar(counts, partition.labels, total=largest, label=client),
                "cells": cells,
            }
        )
    how = {
        "dirichlet": f"Dirichlet label skew, alpha = {partition.alpha:g}"
        if partition.alpha
        else "Dirichlet label skew",
        "iid": "Equal random parts (IID)",
        "sites": "Each site's own data",
    }
    return {
        "how": how.get(partition.kind, partition.kind),
        "total": sum(columns),
        "rows": rows,
        "labels": partition.labels,
        "columns": columns,
        "legend": legend([(name, number) for number, name in enumerate(partition.labels)]),
        "spread": f"{min(sum(r) for _, r in partition.counts):,} to {largest:,} samples a client",
    }


def _factor(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else re.sub(r"\.0$", "", f"{value:.1f}")


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
