"""Steps for a batcher, and a pool that the test holds back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from fednano.host import HostLimits, codec
from fednano.host.compute import step_job
from fednano.host.jobs import Reply
from fednano.host.lane import Lane
from fednano.host.pool import ComputePool
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.stats import Stats
from fednano.host.turns import Ask
from fednano.models.language import LocalLLM


def request(
    llm: LocalLLM, lengths: list[int], *, seed: int = 0, spoil: slice | None = None, **header: Any
) -> Ask:
    """A step's request; ``spoil`` are bytes of it that are overwritten with ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(lengths), llm.hidden_size, generator=generator)
    labels = torch.randint(0, llm.vocab_size, (sum(lengths),), generator=generator, dtype=torch.int32)
    packed, data = codec.pack(rows, torch.float32, lengths)
    fields = {"objective": "cross_entropy", "want_gradient": True} | header
    buffer = codec.Assembler(len(data) + labels.numel() * 4, "test")
    buffer.add(bytes(data))
    buffer.add(bytes(codec.raw(labels)))
    if spoil is not None:
        buffer._memory[spoil] = 127 if spoil.start else 255
    step = pb.StepHeader(embeds=packed, **fields)
    return Ask(step.objective, step.want_gradient, lengths, lambda: step_job(llm, step, buffer))


def numbers(reply: Reply) -> tuple[torch.Tensor, torch.Tensor]:
    result, (data,) = reply
    gradient = codec.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8).numpy(), torch.float32)
    return torch.tensor(list(result.losses)), gradient


def alone(llm: LocalLLM, ask: Ask) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model itself answers."""
    job = ask.prepare()
    losses, gradient = llm.loss_and_gradient(job.x, job.mask, job.labels, job.objective, True)
    assert gradient is not None
    return losses, gradient[job.mask].flatten()


def computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Carrying and computing are done by different threads, as on a GPU."""
    begin = Lane.__init__

    def apart(self: Lane, device: torch.device) -> None:
        begin(self, device)
        self.apart = True

    monkeypatch.setattr(Lane, "__init__", apart)


class Gated:
    """A pool whose jobs wait at a gate, so that requests pile up as the test wants."""

    def __init__(self, workers: int = 1) -> None:
        self.stats = Stats()
        self.pool = ComputePool(HostLimits(), self.stats, workers=workers)
        self.gate = threading.Event()
        run = self.pool.run

        async def gated(job: Callable[[], Any]) -> Any:
            def wait() -> Any:
                assert self.gate.wait(30)
                return job()

            return await run(wait)

        self.pool.run = gated  # type: ignore[method-assign]

    def play(self, scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> None:
            try:
                await asyncio.wait_for(scene(), 60)
            finally:
                self.gate.set()
                await self.pool.close()

        asyncio.run(whole())
