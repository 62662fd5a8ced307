"""Passes and replies beside a device: what is launched when, and who is answered when."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gated import Gated, alone, numbers, request

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
    whole, begin = Passes.compute, Lane.__init__

    def watched(self: Passes, embeds: torch.Tensor, *rest: Any) -> Any:
        *batch, launched = rest
        events.append(f"begin {len(embeds)}")
        time.sleep(0.05)
        events.append(f"launched {len(embeds)}")
        launched()
        time.sleep(0.05)
        return whole(self, embeds, *batch)

    def apart(self: Lane, device: torch.device) -> None:
        begin(self, device)
        self.apart = True

    monkeypatch.setattr(Passes, "compute", watched)
    monkeypatch.setattr(Lane, "__init__", apart)
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


class Device:
    """Does what it is told one after the other, a fifth of a second each, while whoever told it goes on."""

    def __init__(self) -> None:
        self.free = 0.0
        self.passes: list[tuple[float, float]] = []  # told, done

    def tell(self) -> Any:
        told = time.monotonic()
        self.free = end = max(told, self.free) + 0.2
        self.passes.append((told, end))
        return SimpleNamespace(synchronize=lambda: time.sleep(max(end - time.monotonic(), 0.0)))


def test_the_next_pass_is_launched_before_the_device_is_done(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clients in two groups: while one group's pass runs the other group comes back."""
    device, begin = Device(), Lane.__init__

    @contextmanager
    def launching(self: Lane) -> Iterator[Done]:
        done = Done()
        yield done
        done.event = device.tell()

    def apart(self: Lane, where: torch.device) -> None:
        begin(self, where)
        self.apart = True

    monkeypatch.setattr(Lane, "__init__", apart)
    monkeypatch.setattr(Lane, "launching", launching)
    monkeypatch.setattr("fednano.host.batching._ENOUGH_TOKENS", 16)
    monkeypatch.setattr("fednano.host.ahead._SECONDS", 0.05)
    gated = Gated()
    gated.gate.set()
    answered: list[float] = []

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=32)  # four of them

        async def client(number: int) -> None:
            ask = request(local, [8], seed=number)
            right = alone(local, ask)
            for _ in range(4):
                torch.testing.assert_close(numbers(await batcher.run(ask, str(number))), right)
                answered.append(time.monotonic())
                await asyncio.sleep(0.01)

        await asyncio.gather(*map(client, range(8)))

    gated.play(scene)
    early = [told < done for (_, done), (told, _) in itertools.pairwise(device.passes)]
    assert sum(early) >= 3, device.passes
    assert not any(early[:1])  # how long a pass takes is not known before the first has ended
    assert all(told > done - 0.15 for (_, done), (told, _) in itertools.pairwise(device.passes))
    assert min(answered) >= device.passes[0][1]  # nobody is answered before the device is done
    spent = gated.stats.get("pass_milliseconds") / gated.stats.get("batches")
    assert 150 < spent < 350  # the time behind the pass before is not counted


def test_an_error_of_the_device_is_told_to_those_it_concerns(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Lane.__init__

    @contextmanager
    def launching(self: Lane) -> Iterator[Done]:
        done = Done()
        yield done

        def fail() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        done.event = SimpleNamespace(synchronize=fail)  # type: ignore[assignment]

    def apart(self: Lane, where: torch.device) -> None:
        begin(self, where)
        self.apart = True

    monkeypatch.setattr(Lane, "__init__", apart)
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
