"""MLflow: one of its runs for each run. ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME`` say where."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fednano.runs import RunInfo
from fednano.tracking.protocol import Tracker

__all__ = ["make"]

_STATUS = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_MOST = 100  # parameters that MLflow takes at a time


class _MLflow:
    def __init__(self) -> None:
        # By name: the package is optional, and need not be there when types are checked.
        self._mlflow: Any = importlib.import_module("mlflow")

    def start(self, info: RunInfo, settings: Mapping[str, bool | int | float | str]) -> None:
        self._mlflow.start_run(run_name=info.run_id)
        items = list(settings.items())
        for first in range(0, len(items), _MOST):
            self._mlflow.log_params(dict(items[first : first + _MOST]))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def finish(self, status: str) -> None:
        self._mlflow.end_run(status=_STATUS[status])


def make() -> Tracker:
    """A tracker that logs to MLflow. Raises ImportError where it is not installed."""
    return _MLflow()
