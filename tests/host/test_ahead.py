"""Passes and replies beside a device: what is launched when, and who is answered when."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gated import Gated, alone, computed_apart, numbers, request

from fednano.host.ahead import Ahead
from fednano.host.batching import StepBatcher
from fednano.host.jobs import Job, Reply
from fednano.host.lane import Done, Lane
from fednano.host.turns import Ask
from fednano.models.language import LocalLLM
from fednano.models.passes import Passes


def test_replies_go_out_when_the_next_pass_is_launched(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a device that needs the interpreter on the way there only, and with enough waiting for a full pass."""
    events: list[str] = []
    whole = Passes.compute

    def watched(self: Passes, embeds: torch.Tensor, *rest: Any) -> Any:
        *batch, launched = rest
        events.append(f"begin {len(embeds)}")
        time.sleep(0.05)
        events.append(f"launched {len(embeds)}")
        launched()
        time.sleep(0.05)
        return whole(self, embeds, *batch)

    monkeypatch.setattr(Passes, "compute", watched)
    computed_apart(monkeypatch)
    monkeypatch.setattr("fednano.host.batching._ENOUGH_TOKENS", 16)
    gated = Gated()
    gated.gate.set()

    def told(ask: Ask, name: str) -> Ask:
        def prepare() -> Job:
            job = ask.prepare()

            def finish(*outcome: Any) -> Reply:
                events.append(f"reply {name}")
                return job.finish(*outcome)

            return replace(job, finish=finish)

        return replace(ask, prepare=prepare)

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=512)
        first = asyncio.create_task(batcher.run(told(request(local, [8]), "first"), "first"))
        while not events:
            await asyncio.sleep(0.005)
        asks = [told(request(local, [8], seed=i), "second") for i in range(3)]
        second = [asyncio.create_task(batcher.run(ask, str(i))) for i, ask in enumerate(asks)]
        replies = await asyncio.gather(first, *second)
        monkeypatch.undo()
        for i, reply in enumerate(replies[1:]):
            torch.testing.assert_close(numbers(reply), alone(local, request(local, [8], seed=i)))

    gated.play(scene)
    assert events == ["begin 1", "launched 1", "begin 3", "launched 3", "reply first", *["reply second"] * 3]


def test_the_next_pass_is_launched_before_the_device_is_done(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [threading.Event() for _ in range(2)]
    told: list[threading.Event] = []

    @contextmanager
    def launching(self: Lane) -> Iterator[Done]:
        done = Done()
        yield done
        told.append(ends[len(told)])
        done.event = SimpleNamespace(synchronize=told[-1].wait)  # type: ignore[assignment]

    computed_apart(monkeypatch)
    monkeypatch.setattr(Lane, "launching", launching)
    monkeypatch.setattr("fednano.host.batching._ENOUGH_TOKENS", 16)
    gated = Gated()
    gated.gate.set()

    async def until(done: Callable[[], bool]) -> None:
        while not done():
            await asyncio.sleep(0.005)

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=512)
        asks = [request(local, [8], seed=number) for number in range(4)]
        tasks = [asyncio.create_task(batcher.run(asks[0], "0"))]
        await until(lambda: len(told) == 1)
        tasks.append(asyncio.create_task(batcher.run(asks[1], "1")))
        await until(lambda: gated.stats.get("waiting") == 2)
        batcher._launch_ahead()  # one waits: too little
        tasks += [asyncio.create_task(batcher.run(asks[n], str(n))) for n in (2, 3)]
        await until(lambda: gated.stats.get("waiting") == 4 and batcher._turns.tokens == 24)
        batcher._launch_ahead()
        await until(lambda: len(told) == 2)
        batcher._launch_ahead()  # nobody waits, and two are under way
        assert gated.stats.get("batches") == 2
        assert not any(task.done() for task in tasks)
        ends[0].set()
        await tasks[0]
        assert not any(task.done() for task in tasks[1:])  # the device is not done with them
        ends[1].set()
        for ask, reply in zip(asks, await asyncio.gather(*tasks), strict=True):
            torch.testing.assert_close(numbers(reply), alone(local, ask))

    try:
        gated.play(scene)
    finally:
        for end in ends:
            end.set()


def test_when_a_pass_is_expected_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, timers = 100.0, []
    loop = SimpleNamespace(
        call_later=lambda wait, _: timers.append(wait) or SimpleNamespace(cancel=lambda: timers.append("off"))  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr("fednano.host.ahead.time.monotonic", lambda: now)
    monkeypatch.setattr("fednano.host.ahead.asyncio.get_running_loop", lambda: loop)
    ahead = Ahead(lambda: None)
    first = ahead.begin(1000)
    assert timers == []  # how long one takes is not known yet
    now = 101.0
    ahead.end(first)
    assert ahead.seconds == 1.0
    second = ahead.begin(1200)  # 1.2 s, so that it ends at 102.2
    assert timers == [pytest.approx(1.18)]
    now = 102.18
    third = ahead.begin(1200)  # behind it
    assert timers[1:] == [pytest.approx(0.02 + 1.2 - 0.02)]
    now = 102.4  # later than expected, and so is what follows
    ahead.end(second)
    assert ahead.seconds == pytest.approx(1.4)
    fourth = ahead.begin(1200)
    assert timers[2:] == ["off", pytest.approx(0.2 + 0.98 + 0.02 + 1.4 - 0.02)]
    now = 103.6
    ahead.end(third)
    assert ahead.seconds == pytest.approx(1.2)  # the time behind the second is not counted
    now = 104.0
    ahead.end(fourth)
    timers.clear()
    ahead.end(ahead.begin(100))  # unlike the last: no telling
    assert timers == []
    ahead.begin(100)
    assert timers == []  # and the last took no time at all


def test_an_error_of_the_device_is_told_to_those_it_concerns(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def launching(self: Lane) -> Iterator[Done]:
        done = Done()
        yield done

        def fail() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        done.event = SimpleNamespace(synchronize=fail)  # type: ignore[assignment]

    computed_apart(monkeypatch)
    gated = Gated()
    gated.gate.set()

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=512)
        with monkeypatch.context() as patched:
            patched.setattr(Lane, "launching", launching)
            with pytest.raises(RuntimeError, match="illegal memory access"):
                await batcher.run(request(local, [8]), "a")
        await batcher.run(request(local, [8]), "a")

    gated.play(scene)
    assert gated.stats.get("waiting") == 0
