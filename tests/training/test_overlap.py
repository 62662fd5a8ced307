"""Overlapping calls: order, width, and what happens when one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from fednano.training.overlap import overlap


@pytest.mark.parametrize("width", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks_whatever_ends_first(width: int) -> None:
    ended = [threading.Event() for _ in range(9)]

    def task(index: int) -> Callable[[], int]:
        def run() -> int:
            if width > 1 and index % width == 0 and index + 1 < len(ended):
                assert ended[index + 1].wait(10)  # the next one ends first
            ended[index].set()
            return index

        return run

    assert list(overlap([task(i) for i in range(9)], width)) == list(range(9))


def test_no_more_run_at_one_time_than_asked_and_the_source_is_not_drained_ahead() -> None:
    lock, state = threading.Lock(), {"running": 0, "most": 0, "taken": 0}
    pause = threading.Event()

    def run() -> None:
        with lock:
            state["running"] += 1
            state["most"] = max(state["most"], state["running"])
        pause.wait(0.002)
        with lock:
            state["running"] -= 1

    def source() -> Iterator[Callable[[], None]]:
        for _ in range(40):
            state["taken"] += 1
            yield run

    for done, _ in enumerate(overlap(source(), 3)):
        assert state["taken"] <= done + 6
    assert state["most"] == 3


def test_the_first_error_comes_out_and_nothing_more_begins() -> None:
    begun: list[int] = []

    def task(index: int) -> Callable[[], int]:
        def run() -> int:
            begun.append(index)
            if index == 1:
                raise ValueError("no")
            return index

        return run

    results = overlap([task(i) for i in range(100)], 2)
    assert next(results) == 0
    with pytest.raises(ValueError, match="no"):
        list(results)
    assert len(begun) < 10
