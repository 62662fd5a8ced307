"""``summary.json``: the outcome of a run in one object, checked before it is written and when it is read."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fednano.errors import RunError
from fednano.evaluation import TITLES

__all__ = ["REQUIRED", "STATUSES", "Phase", "Summary", "installed_versions"]

REQUIRED: dict[str, tuple[str, ...]] = {
    "accuracy": ("zero_shot", "federated"),
    "bytes": (
        "adapter_up_per_client_round",
        "adapter_down_per_client_round",
        "activation_up_per_sample_step",
        "activation_down_per_sample_step",
    ),
    "parameters": ("model", "edge", "trainable"),
    "versions": ("fednano", "python"),
}
STATUSES = ("complete", "interrupted")


def installed_versions() -> dict[str, str]:
    """Versions of fednano, Python and the packages that decide a run's numbers, as far as they are
    installed."""
    from importlib.metadata import PackageNotFoundError, version

    from fednano import __version__

    found = {"fednano": __version__, "python": platform.python_version()}
    for package in (
        "torch",
        "transformers",
        "flwr",
        "flwr-datasets",
        "grpcio",
        "safetensors",
        "numpy",
        "easy-vqa",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Phase:
    """One phase of a run: zero-shot evaluation, federated tuning, a baseline.

    Attributes:
        accuracy: score on the test set after the last round, by the run's metric, in [0, 1].
        rounds: rounds done; 0 for an evaluation only.
        seconds: wall time of the phase, or None where it was not measured by itself.
        loss: loss at the end, or None.
        note: one sentence on what the number is, for instance ``"mean of 5 clients"``.
    """

    accuracy: float
    rounds: int = 0
    seconds: float | None = None
    loss: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The outcome of a run.

    Attributes:
        accuracy: phase -> score on the test set by ``metric``, in [0, 1]; at least ``zero_shot`` and ``federated``.
        bytes: measured on the wire. ``adapter_up_per_client_round``, ``adapter_down_per_client_round``: mean
            bytes of one client in one round. ``activation_up_per_sample_step``,
            ``activation_down_per_sample_step``: mean bytes of one sample in one training step. Up is towards
            the server. More keys may follow.
        parameters: numbers of parameters: ``model`` (all), ``edge`` (on the client), ``trainable``
            (adapters).
        rounds: federated rounds done.
        clients: clients of the run.
        seed: seed of the run.
        wall_seconds: seconds from start to end.
        rule: aggregation rule.
        adapter: adapter.
        model: name of the model.
        dataset: name of the data set.
        versions: package -> version; at least ``fednano`` and ``python``. See ``installed_versions``.
        phases: more about each phase; keys as in ``accuracy``.
        test_samples: number of test samples behind each accuracy, or None.
        status: ``"complete"``, or ``"interrupted"`` where fewer rounds were done than asked for.
        metric: what ``accuracy`` is measured by, a name in `fednano.evaluation.METRICS`.
        scores: phase -> metric -> score, for every metric that fits the data; perplexity where answers are free text.
        extra: anything else to keep; must be JSON.
    """

    accuracy: Mapping[str, float]
    bytes: Mapping[str, float]
    parameters: Mapping[str, int]
    rounds: int
    clients: int
    seed: int
    wall_seconds: float
    rule: str
    adapter: str
    model: str = ""
    dataset: str = ""
    versions: Mapping[str, str] = field(default_factory=installed_versions)
    phases: Mapping[str, Phase] = field(default_factory=dict)
    test_samples: int | None = None
    status: str = "complete"
    metric: str = "exact-match"
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise RunError("The summary of the run is not complete: " + "; ".join(problems) + ".")

    def to_json(self) -> dict[str, Any]:
        """The object that ``summary.json`` holds."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Summary:
        """Read the content of ``summary.json``.

        Raises:
            RunError: a field is missing, unknown, or out of its range.
        """
        if not isinstance(value, Mapping):
            raise RunError(f"summary.json must hold an object, got {type(value).__name__}. Repeat the run.")
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise RunError(
                f"summary.json has unknown fields {unknown}. Use the fednano version that made the run."
            )
        content = dict(value)
        try:
            content["phases"] = {name: Phase(**phase) for name, phase in content.get("phases", {}).items()}
            return cls(**content)
        except (TypeError, AttributeError) as error:
            raise RunError(f"summary.json is not complete: {error}. Repeat the run.") from error


def _problems(summary: Summary) -> list[str]:
    found: list[str] = []
    for name, keys in REQUIRED.items():
        mapping = getattr(summary, name)
        if not isinstance(mapping, Mapping):
            found.append(f"{name} must be a mapping, got {mapping!r:.60}")
            continue
        found += [f"{name}.{key} is missing" for key in keys if key not in mapping]
        for key, value in mapping.items():
            found += _check_entry(name, str(key), value)
    for name, least in (("rounds", 0), ("clients", 1), ("seed", 0)):
        found += _check_whole(name, getattr(summary, name), least)
    found += _check_number("wall_seconds", summary.wall_seconds, 0, math.inf)
    if summary.test_samples is not None:
        found += _check_whole("test_samples", summary.test_samples, 1)
    if summary.metric not in TITLES:
        found.append(f"metric must be one of {', '.join(TITLES)}, got {summary.metric!r:.60}")
    for name in ("rule", "adapter"):
        if not isinstance(getattr(summary, name), str) or not getattr(summary, name):
            found.append(f"{name} must be a name, got {getattr(summary, name)!r:.60}")
    if summary.status not in STATUSES:
        found.append(f"status must be one of {', '.join(STATUSES)}, got {summary.status!r:.60}")
    for name, phase in summary.phases.items():
        found += _check_number(f"phases.{name}.accuracy", phase.accuracy, 0, 1)
        found += _check_whole(f"phases.{name}.rounds", phase.rounds, 0)
        for key in ("seconds", "loss"):
            if getattr(phase, key) is not None:
                found += _check_number(f"phases.{name}.{key}", getattr(phase, key), -math.inf, math.inf)
    return found


def _check_entry(name: str, key: str, value: object) -> list[str]:
    place = f"{name}.{key}"
    if name == "versions":
        return [] if isinstance(value, str) and value else [f"{place} must be a version, got {value!r:.60}"]
    if name == "parameters":
        return _check_whole(place, value, 0)
    return _check_number(place, value, 0, 1 if name == "accuracy" else math.inf)


def _check_whole(place: str, value: object, least: int) -> list[str]:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return [] if good else [f"{place} must be a whole number of at least {least}, got {value!r:.60}"]


def _check_number(place: str, value: object, least: float, most: float) -> list[str]:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good and isinstance(value, int | float) and least <= value <= most:
        return []
    return [f"{place} must be a finite number in [{least}, {most}], got {value!r:.60}"]
