"""Measurements that depend on each other, as many at a time as there are processes; what waits longest comes first."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Step", "carry_out"]

Row = dict[str, Any]


class Step(Protocol):
    """One measurement; hashable, and picklable."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def urgency(self) -> float:
        """Of those that can begin, the most urgent one does."""
        ...

    @property
    def needs(self) -> tuple[Any, ...]:
        """What has to be there before."""
        ...


S = TypeVar("S", bound=Step)


@dataclass
class _State(Generic[S]):
    waiting: set[S]
    running: dict[Future[Row], S]
    done: dict[S, Row]
    failed: dict[S, str]


def carry_out(
    steps: Iterable[S],
    measure: Callable[[S], Row],
    *,
    jobs: int,
    then: Callable[[Mapping[S, Row]], Iterable[S]] = lambda done: (),
    told: Callable[[Mapping[S, Row], int], None] = lambda done, left: None,
) -> tuple[dict[S, Row], dict[S, str]]:
    """Measure all steps in a pool of processes.

    Args:
        steps: what is known from the start.
        measure: makes a step's row, in another process.
        jobs: processes.
        then: asked after each step, with what is there; names further steps, and may name some again.
        told: called after each step with what is there, and how many wait or run.

    Returns:
        Rows, and the failures: a step that failed takes those with it that need it, and no others.
    """
    state: _State[S] = _State(set(steps), {}, {}, {})
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        while state.waiting or state.running:
            _fail_dependants(state)
            ready = [s for s in state.waiting if all(n in state.done for n in s.needs)]
            ready.sort(key=lambda s: (-s.urgency, s.name))
            for step in ready[: jobs - len(state.running)]:
                state.waiting.remove(step)
                state.running[pool.submit(measure, step)] = step
            if not state.running:
                break
            finished, _ = wait(state.running, return_when=FIRST_COMPLETED)
            for each in finished:
                step = state.running.pop(each)
                try:
                    state.done[step] = each.result()
                except Exception as error:  # one measurement less; the others go on
                    state.failed[step] = "".join(traceback.format_exception(error))
            known = {*state.waiting, *state.running.values(), *state.done, *state.failed}
            state.waiting |= {step for step in then(state.done) if step not in known}
            told(state.done, len(state.waiting) + len(state.running))
    finally:
        pool.shutdown(cancel_futures=True)
    return state.done, state.failed


def _fail_dependants(state: _State[S]) -> None:
    lost = {s for s in state.waiting if any(n in state.failed for n in s.needs)}
    while lost:
        for step in lost:
            state.failed[step] = "what it needs has failed"
        state.waiting -= lost
        lost = {s for s in state.waiting if any(n in state.failed for n in s.needs)}
