"""A job's page: one self-contained file that shows verdict, request, curves, figures, probes and the receipt's hash.

It holds what `fednano unlearn show` and the receipt hold, and no sample. Whatever comes from people is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fednano.runs.atomic import write_bytes
from fednano.runs.charts import Series, legend, line_chart
from fednano.runs.report import page
from fednano.runs.text import format_bytes, format_percent, format_seconds
from fednano.security.canonical import sha256_hex
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.receipt import NOT_AVAILABLE
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.views import details, note

__all__ = ["job_report_html", "write_job_report"]

_ROWS = (
    ("Exact memorisation", ("forget", "exact_memorisation")),
    ("Extraction strength", ("forget", "extraction_strength")),
    ("Extraction likelihood EL_10", ("forget", "el")),
    ("Memorisation accuracy", ("forget", "ma")),
    ("Answer probability", ("forget", "probability")),
    ("ROUGE-L", ("forget", "rouge_l")),
    ("Exact memorisation, retained samples", ("retain", "exact_memorisation")),
    ("Answer probability, retained samples", ("retain", "probability")),
    ("Exact memorisation, unseen samples", ("unseen", "exact_memorisation")),
    ("Utility: answer probability on test questions", ("utility",)),
    ("Accuracy on test questions", ("accuracy",)),
    ("Membership inference by loss, AUC", ("attacks", "loss", "value")),
    ("Membership inference by Min-K, AUC", ("attacks", "min_k", "value")),
    ("PrivLeak, percent", ("priv_leak",)),
)
_CURVES = (
    ("Forget set", "what is left of it", (("ma", "memorisation accuracy"), ("el", "EL_10"))),
    ("Inverted hinge loss", "of the forget set", (("ihl", "inverted hinge"),)),
    ("Utility", "answer probability on test questions", (("utility", "utility"),)),
    ("Retain loss", "nats a token", (("retain_loss", "retain loss"),)),
)


def write_job_report(desk: Desk, identity: str, out: Path | None = None) -> Path:
    """Write a job's page.

    Args:
        desk: the run's desk.
        identity: the job.
        out: the file; by default ``unlearning/receipts/<job>.html``.

    Returns:
        The file.

    Raises:
        JobError: there is no such job.
        RunError: the page cannot be written.
    """
    content = job_report_html(desk, identity).encode("utf-8", "replace")
    path = desk.place.receipt(identity).with_suffix(".html") if out is None else out
    write_bytes(path, content)
    return path


def job_report_html(desk: Desk, identity: str) -> str:
    """The page of a job in any state."""
    job = desk.store.job(identity)
    body = details(desk, job)
    path = desk.place.receipt(identity)
    content = path.read_bytes() if path.is_file() else b""
    receipt: dict[str, Any] = json.loads(content)["receipt"] if content else {}
    metrics = receipt.get("metrics") or job.facts.get("outcome") or {}
    probes = {**_known(receipt.get("probes")), **_known(body["facts"].get("probes"))}
    return page(
        "job.html.j2",
        job=body,
        run=desk.place.folder.id,
        verdict=_verdict(body, metrics, probes),
        asked=_asked(body),
        curves=_charts(body["rounds"]),
        figures=_figures(metrics),
        reference_kind=receipt.get("reference", NOT_AVAILABLE),
        probes=[*_probe_rows(probes), *_earlier_rows(_known(receipt.get("earlier_forget_sets")))],
        record=_record(receipt, content),
    )


def _known(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _verdict(
    body: Mapping[str, Any], metrics: Mapping[str, Any], probes: Mapping[str, Any]
) -> dict[str, Any]:
    state, count = body["state"], body["samples"]
    before, after = (_at(metrics, when, "forget", "exact_memorisation") for when in ("before", "after"))
    sentences = {
        State.COMMITTED.value: f"{count} samples of {body['site']} are forgotten by the stop rule, and the adapter "
        "without them is in force.",
        State.REJECTED.value: f"Nothing was changed: {body['note']}.",
        State.ROLLED_BACK.value: "The job was committed and rolled back: the adapter of before is in force again.",
    }
    warnings = [
        f"Known again in run {a['run']}, round {a['round']}: exact memorisation {a['exact_memorisation']:.3f} over "
        f"{a['level']:.3f}."
        for a in body["alarms"]
    ]
    warnings += [
        f"The probe {n!r} brings the samples back." for n, p in probes.items() if _known(p).get("back")
    ]
    return {
        "before": None if before is None else format_percent(before),
        "after": None if before is None or after is None else format_percent(after),
        "direction": {State.COMMITTED.value: "down" if warnings else "up", State.REJECTED.value: "down"}.get(
            state, "unknown"
        ),
        "sentence": sentences.get(state, f"The job is {state}. {body['note']}".strip()),
        "warnings": warnings,
    }


def _asked(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    request, given = body["request"], [each["name"] for each in body["approvals"]["given"]]
    plan = ("method", "rank", "rounds", "steps", "seed", "utility_floor")
    return [
        ("Scope", f"{body['samples']} samples ({body['scope']})"),
        ("Reason", str(request["reason"])),
        ("Deadline", body["deadline"] or "none"),
        ("Approvals", f"{len(given)} of {body['approvals']['needed']} {' '.join(given)}".strip()),
        ("Plan", ", ".join(f"{name.replace('_', ' ')} {request[name]}" for name in plan)),
        ("Signed by", body["signed_by"]),
    ]


def _charts(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for title, remark, lines in _CURVES:
        series = [
            Series(name, [(r["number"], r[key]) for r in rounds if r.get(key) is not None], colour=number)
            for number, (key, name) in enumerate(lines)
        ]
        series = [each for each in series if each.points]
        if series:
            last = ", ".join(f"{each.name} {each.points[-1][1]:.3f}" for each in series)
            svg = line_chart(
                series,
                title=f"{title} over the rounds",
                description=f"After the last round: {last}.",
                x_label="round",
                y_format=lambda value: f"{value:.3f}",
            )
            named = legend([(each.name, each.colour) for each in series]) if len(series) > 1 else ""
            made.append({"title": title, "remark": remark, "svg": svg, "legend": named})
    return made


def _figures(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    if not metrics:
        return []
    return [
        (name, *(_written(_at(metrics, when, *path)) for when in ("before", "after", "reference")))  # type: ignore[misc]
        for name, path in _ROWS
    ]


def _probe_rows(probes: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for name, each in probes.items():
        found = _known(each)
        if not found:
            rows.append((name, NOT_AVAILABLE, "these samples do not allow it"))
        else:
            rows.append((name, "comes back" if found.get("back") is True else "holds", note(found)))
    return rows


def _earlier_rows(earlier: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (f"forget set of {job}", "holds", note(each))
        if isinstance(each, Mapping)
        else (f"forget set of {job}", NOT_AVAILABLE, "its samples are out of reach")
        for job, each in earlier.items()
    ]


def _record(receipt: Mapping[str, Any], content: bytes) -> list[tuple[str, str]]:
    if not receipt:
        return [("Receipt", "none: a job gets one when it is committed")]
    cost = receipt["cost"]
    return [
        ("Receipt, sha256", sha256_hex(content)),
        ("Adapter before", receipt["adapter"]["before"]),
        ("Adapter after", receipt["adapter"]["after"]),
        ("Line of the log", str(receipt["log"]["index"] + 1)),
        ("Cost", f"{format_seconds(cost['client_seconds'])} of clients, {format_bytes(cost['bytes'])}"),
        (
            "Site's own statement",
            "signed" if isinstance(receipt["site_statement"], Mapping) else NOT_AVAILABLE,
        ),
        *(("Approximation", text) for text in receipt["approximations"]),
        *(("Limit", text) for text in receipt["limits"]),
    ]


def _at(value: Any, *path: str) -> float | None:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _written(value: float | None) -> str:
    return NOT_AVAILABLE if value is None else f"{value:.4f}"
