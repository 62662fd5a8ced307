"""`fednano evaluate`: score what others measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fednano.unlearning.metrics import TofuReport

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Score evaluation logs.")


@app.callback()
def _root() -> None:
    """A callback makes `evaluate` a group of commands even while it has one."""


@app.command()
def tofu(
    log: Annotated[Path, typer.Option(help="TOFU's eval_log_aggregated.json of the unlearned model.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="The same of the model trained without the forget set (retain99 for forget01, retain95 for forget05, "
            "retain90 for forget10). Without it there is no forget quality."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Forget quality and model utility from TOFU's own evaluation logs."""
    from fednano.unlearning.metrics import evaluate_tofu, read_log

    report = evaluate_tofu(read_log(log), None if reference is None else read_log(reference))
    typer.echo(json.dumps(report.to_json(), indent=1) if as_json else _text(report))


def _text(report: TofuReport) -> str:
    quality = report.forget_quality
    if quality is None:
        shown = "not available: give --reference, the log of a model trained without the forget set"
    else:
        shown = (
            f"p = {quality.p:.4g} (log10 {quality.log10_p:.2f}), KS statistic {quality.statistic:.4f}, "
            f"n = {quality.n} against {quality.n_reference}"
        )
    lines = [f"forget quality  {shown}", f"model utility   {report.model_utility:.4f}", ""]
    lines.append(f"{'':13}{'probability':>12}{'rouge-l':>12}{'truth ratio':>12}{'questions':>12}")
    for group, count in report.questions.items():
        own = (
            report.forget
            if group == "forget"
            else {
                k.partition(".")[2]: v for k, v in report.utility_parts.items() if k.startswith(f"{group}.")
            }
        )
        numbers = "".join(f"{own[metric]:12.4f}" for metric in ("probability", "rouge_l", "truth_ratio"))
        lines.append(f"{group:13}{numbers}{count:12d}")
    return "\n".join(lines)
