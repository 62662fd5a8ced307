"""Weights & Biases: one of its runs for each run. ``WANDB_PROJECT``, ``WANDB_MODE=offline`` and such say where."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fednano.runs import RunInfo
from fednano.tracking.protocol import Tracker

__all__ = ["make"]


class _Wandb:
    def __init__(self) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._run: Any = None
        self._phases: set[str] = set()

    def start(self, info: RunInfo, settings: Mapping[str, bool | int | float | str]) -> None:
        self._run = self._wandb.init(name=info.run_id, config=dict(settings), dir=str(info.path))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        # Its own step must never go back, and rounds begin anew with each phase: so each phase has its own axis.
        phase = next(iter(values)).partition("/")[0]
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/round")
        self._run.log({f"{phase}/round": step, **values})

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "complete" else 1)


def make() -> Tracker:
    """A tracker that logs to Weights & Biases. Raises ImportError where it is not installed."""
    return _Wandb()
