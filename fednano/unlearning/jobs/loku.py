"""The runner of this package behind the worker's Protocol."""

from __future__ import annotations

from collections.abc import Callable

from fednano.errors import JobStateError
from fednano.unlearning.jobs.runner import Result, Round, Task

__all__ = ["LokuRunner"]


class LokuRunner:
    """Hands tasks to :mod:`fednano.unlearning.runner`."""

    def __call__(self, task: Task, *, progress: Callable[[Round], None], stop: Callable[[], bool]) -> Result:
        raise JobStateError("no runner")
