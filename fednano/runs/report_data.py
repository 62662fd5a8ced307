"""Reading a run folder for the report: each file becomes a small object, or a sentence that says why it is not
there.

A report must come out of an interrupted run, too, so nothing here raises for a file that is missing or damaged.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fednano.errors import FednanoError, RunError
from fednano.evaluation import exact_match
from fednano.runs.folder import RunFolder
from fednano.runs.report_extra import spectra
from fednano.runs.report_metrics import MAIN, Metrics, natural_key, read_metrics
from fednano.runs.summary import Summary

__all__ = ["Partition", "Prediction", "ReportData", "collect"]

_LARGEST_PICTURE = 320
_PREDICTIONS = 48
T = TypeVar("T")


@dataclass(frozen=True)
class Partition:
    """``partition.json``.

    Attributes:
        kind: how the data was divided.
        alpha: Dirichlet concentration, or None.
        labels: label names, ``(L,)``, the most frequent first.
        counts: (client, samples of each label ``(L,)``).
    """

    kind: str
    alpha: float | None
    labels: list[str]
    counts: list[tuple[str, list[int]]]


@dataclass(frozen=True)
class Prediction:
    """One row of ``predictions.json``.

    Attributes:
        picture: the image as a data URI, or None.
        question: what was asked.
        answer: the right answer.
        before: the untuned model's answer, or None.
        after: the tuned model's answer, or None.
        before_right: whether ``before`` is right: its score by the run's metric is at least one half.
        after_right: the same of ``after``.
    """

    picture: str | None
    question: str
    answer: str
    before: str | None
    after: str | None
    before_right: bool
    after_right: bool

    @property
    def outcome(self) -> str:
        """``"fixed"``, ``"kept"``, ``"broken"`` or ``"wrong"``."""
        if self.after_right:
            return "kept" if self.before_right else "fixed"
        return "broken" if self.before_right else "wrong"


@dataclass
class ReportData:
    """All that the report shows.

    Attributes:
        run_id: name of the run folder.
        config: settings; empty where ``config.json`` is missing.
        summary: outcome, or None.
        metrics: measurements.
        partition: division of the data, or None.
        predictions: sample predictions.
        spectrum: stream -> singular values of the final adapter's change.
        events: warnings and errors, as (time, level, text).
        missing: section -> why it is empty.
    """

    run_id: str
    config: dict[str, Any]
    summary: Summary | None
    metrics: Metrics
    partition: Partition | None
    predictions: list[Prediction]
    spectrum: dict[str, list[float]]
    events: list[tuple[str, str, str]]
    missing: dict[str, str]


def collect(run: RunFolder) -> ReportData:
    """Read everything that the report needs; what cannot be read is explained in ``missing``."""
    missing: dict[str, str] = {}

    def attempt(section: str, read: Callable[[], T], default: T) -> T:
        try:
            return read()
        except (FednanoError, TypeError, ValueError, KeyError, AttributeError, OSError) as error:
            text = str(error) if isinstance(error, FednanoError) else f"unexpected content ({error!r})"
            missing[section] = text.replace(str(run.path), run.id)
            return default

    no_rows: list[dict[str, Any]] = []
    rows = attempt("metrics", run.metrics, no_rows)
    if not rows and "metrics" not in missing:
        missing["metrics"] = "metrics.jsonl does not exist or is empty: no round was finished."
    metrics = attempt("metrics", lambda: read_metrics(rows), Metrics())
    reasons = [reason for *_, reason in metrics.refused]
    return ReportData(
        run_id=run.id,
        config=attempt("config", run.config, {}),
        summary=attempt("summary", lambda: Summary.from_json(run.read_json("summary.json")), None),
        metrics=metrics,
        partition=attempt("partition", lambda: _partition(run.read_json("partition.json")), None),
        predictions=attempt("predictions", lambda: _predictions(run, run.read_json("predictions.json")), []),
        spectrum=attempt("spectrum", lambda: spectra(run.load_adapter()[0]), {}),
        events=[
            (str(event.get("time", "")), str(event["level"]), str(event.get("text", "")))
            for event in attempt("events", run.events, no_rows)
            # a refused update stands in its own table already
            if event.get("level") in ("warning", "error")
            and not any(str(event.get("text", "")).endswith(reason) for reason in reasons)
        ],
        missing=missing,
    )


def _partition(value: Any) -> Partition | None:
    labels = [str(label) for label in value["labels"]]
    counts = [(str(client), [int(n) for n in row]) for client, row in value["counts"].items()]
    if not counts or not labels:
        raise RunError("partition.json holds no counts: the clients did not tell their labels.")
    if any(len(row) != len(labels) or min(row) < 0 for _, row in counts):
        raise RunError("partition.json is damaged: each client needs one count for each label.")
    order = sorted(
        range(len(labels)), key=lambda place: (-sum(row[place] for _, row in counts), labels[place])
    )
    alpha = value.get("alpha") if value.get("kind") == "dirichlet" else None
    return Partition(
        kind=str(value.get("kind", "")),
        alpha=None if alpha is None else float(alpha),
        labels=[labels[place] for place in order],
        counts=sorted(
            ((client, [row[place] for place in order]) for client, row in counts),
            key=lambda item: natural_key(item[0]),
        ),
    )


def _predictions(run: RunFolder, rows: Any) -> list[Prediction]:
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise RunError("predictions.json is damaged: expected a list of objects.")
    found = []
    for row in rows[:_PREDICTIONS]:
        answer, before, after = str(row["answer"]), row.get("zero_shot"), row.get(MAIN)
        scores = row.get("scores") or {}

        def right(said: Any, phase: str, answer: str = answer, scores: Any = scores) -> bool:
            given = scores.get(phase)
            if isinstance(given, int | float):
                return given >= 0.5
            return said is not None and exact_match(str(said), answer)

        found.append(
            Prediction(
                picture=_picture(run, row.get("image")),
                question=str(row["question"]),
                answer=answer,
                before=None if before is None else str(before),
                after=None if after is None else str(after),
                before_right=right(before, "zero_shot"),
                after_right=right(after, MAIN),
            )
        )
    return found


def _picture(run: RunFolder, name: Any) -> str | None:
    """A picture of the run folder as a data URI, made smaller if it is large; None where there is none that
    decodes."""
    from fednano.data import decode_image

    if not isinstance(name, str):
        return None
    try:
        image = decode_image(run.file(name))
    except FednanoError:
        return None
    image.thumbnail((_LARGEST_PICTURE, _LARGEST_PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
