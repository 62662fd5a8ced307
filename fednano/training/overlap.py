"""Ask a language host several things at once, and take the answers in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["overlap"]

T = TypeVar("T")


def overlap(tasks: Iterable[Callable[[], T]], width: int) -> Iterator[T]:
    """Run tasks on ``width`` threads and yield their results in the order of the tasks.

    The next task is taken only when there is a place for it, so that a generator of batches never runs far ahead. What
    a task needs of the caller's thread-local state, such as ``torch.no_grad``, it must set itself.

    Args:
        tasks: taken one by one, in the caller's thread.
        width: most tasks at one time, at least 1.

    Raises:
        Exception: what the first failing task raised; tasks not begun are dropped, those at work are waited for.
    """
    with ThreadPoolExecutor(width, thread_name_prefix="overlap") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for task in tasks:
                if len(pending) > width:  # one waits while `width` run
                    yield pending.popleft().result()
                pending.append(pool.submit(task))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
