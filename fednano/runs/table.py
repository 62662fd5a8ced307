"""The table at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fednano.evaluation import TITLES
from fednano.runs.text import format_bytes, format_count, format_percent, phase_title

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fednano.runs.summary import Summary

__all__ = ["final_rows", "final_table", "print_final_table"]


def final_rows(summary: Summary, report: Path | None = None) -> list[tuple[str, str]]:
    """What the final table says, as (name, value) pairs; accuracies first.

    Args:
        summary: outcome of the run.
        report: path of the report, or None where none was written.
    """
    before = summary.accuracy["zero_shot"]
    title = TITLES[summary.metric]
    rows: list[tuple[str, str]] = []
    for phase, accuracy in summary.accuracy.items():
        gain = "" if phase == "zero_shot" else f"  ({100 * (accuracy - before):+.1f} points)"
        rows.append((f"{title}, {phase_title(phase).lower()}", format_percent(accuracy) + gain))
    for name, score in summary.scores.get("federated", {}).items():
        if name != summary.metric:
            shown = f"{score:.2f}" if name == "perplexity" else format_percent(score)
            rows.append((f"{TITLES.get(name, name.capitalize())}, federated", shown))
    spread = summary.extra.get("on_clients")
    if spread and spread["clients"] > 1:
        shown = f"{format_percent(spread['mean'])}, worst {spread['worst_client']} {format_percent(spread['low'])}"
        rows.append((f"{title}, on the clients' own samples", shown))
    size, count = summary.bytes, summary.parameters
    rounds = f"{summary.rounds} with {summary.clients} clients"
    rows += [
        ("Rounds", rounds if summary.status == "complete" else f"{rounds} ({summary.status})"),
        (
            "Adapter, a client and round",
            f"{format_bytes(size['adapter_up_per_client_round'])} up, "
            f"{format_bytes(size['adapter_down_per_client_round'])} down",
        ),
        (
            "Activations, a sample and step",
            f"{format_bytes(size['activation_up_per_sample_step'])} up, "
            f"{format_bytes(size['activation_down_per_sample_step'])} down",
        ),
        (
            "Parameters",
            f"{format_count(count['model'])} model, {format_count(count['edge'])} on the edge, "
            f"{format_count(count['trainable'])} trainable",
        ),
        ("Wall time", f"{summary.wall_seconds:.0f} s"),
    ]
    if privacy := summary.extra.get("privacy"):
        spent = f"epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:g}, for each {privacy['unit']}"
        rows.append(("Privacy spent", spent))
    if report is not None:
        rows.append(("Report", str(report)))
    return rows


def final_table(summary: Summary) -> Table:
    """The same as a rich table, without the report's path."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, show_header=False, title="fednano", title_justify="left", pad_edge=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in final_rows(summary):
        style = "bold green" if name.endswith(", federated") else ""
        table.add_row(Text(name), Text(value, style=style))
    return table


def print_final_table(
    summary: Summary,
    report: Path | None = None,
    *,
    file: TextIO | None = None,
    console: Console | None = None,
    plain: bool = False,
) -> None:
    """Print the table.

    Args:
        summary: outcome of the run.
        report: path of the report.
        file: where to print, when no console is given.
        console: the rich console to print on.
        plain: no colours and no boxes, one ``name  value`` line each: the same on a terminal and in a file.
    """
    if plain:
        rows = final_rows(summary, report)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:<{width}}  {value}", file=file)
        return
    from rich.console import Console
    from rich.text import Text

    target = console or Console(file=file)
    target.print(final_table(summary))
    if report is not None:
        # below the table and never wrapped, so that a terminal recognises the path
        target.print(Text.assemble(("Report  ", "dim"), str(report)), soft_wrap=True)
