"""TensorBoard: event files in ``tensorboard/`` of the run folder. See them with ``tensorboard --logdir runs``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fednano.runs import RunInfo
from fednano.tracking.protocol import Tracker

__all__ = ["make"]


class _TensorBoard:
    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._writer: Any = None

    def start(self, info: RunInfo, settings: Mapping[str, bool | int | float | str]) -> None:
        self._writer = self._make(log_dir=str(info.path / "tensorboard"))
        self._writer.add_text("settings", "```\n" + json.dumps(dict(settings), indent=1) + "\n```")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, status: str) -> None:
        self._writer.add_text("status", status)
        self._writer.close()


def make() -> Tracker:
    """A tracker that writes event files. Raises ImportError where tensorboard is not installed."""
    return _TensorBoard()
