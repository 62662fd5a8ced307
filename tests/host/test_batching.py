"""Steps that share a pass: right, fair, and nobody suffers for another's mistake."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fednano.errors import ConfigError, HostRefused
from fednano.host import HostLimits, RemoteLLM, codec, serve
from fednano.host.batching import StepBatcher
from fednano.host.compute import StepReply, compute_step, compute_steps
from fednano.host.pool import ComputePool
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.stats import Stats
from fednano.models.language import LocalLLM

Request = tuple[pb.StepHeader, codec.Assembler]


def request(llm: LocalLLM, lengths: list[int], *, seed: int = 0, **header: Any) -> Request:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(lengths), llm.hidden_size, generator=generator)
    labels = torch.randint(0, llm.vocab_size, (sum(lengths),), generator=generator, dtype=torch.int32)
    packed, data = codec.pack(rows, torch.float32, lengths)
    fields = {"objective": "cross_entropy", "want_gradient": True} | header
    buffer = codec.Assembler(len(data) + labels.numel() * 4, "test")
    buffer.add(bytes(data))
    buffer.add(bytes(codec.raw(labels)))
    return pb.StepHeader(embeds=packed, **fields), buffer


def numbers(reply: StepReply) -> tuple[torch.Tensor, torch.Tensor]:
    result, data = reply
    gradient = codec.decode(torch.frombuffer(bytearray(data), dtype=torch.uint8).numpy(), torch.float32)
    return torch.tensor(list(result.losses)), gradient


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=3), min_size=1, max_size=5))
def test_each_reply_equals_that_of_the_lone_request(shapes: list[list[int]], local: LocalLLM) -> None:
    requests = [request(local, lengths, seed=i) for i, lengths in enumerate(shapes)]
    for one, reply in zip(requests, compute_steps(local, requests), strict=True):
        assert not isinstance(reply, Exception)
        for got, expected in zip(numbers(reply), numbers(compute_step(local, *one)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_bad_request_is_refused_alone(local: LocalLLM) -> None:
    good = request(local, [4, 6])
    header, buffer = request(local, [5], seed=1)
    buffer._memory[:4] = 255  # a NaN
    wrong = request(local, [3], seed=2)
    wrong[1]._memory[-4:] = 127  # a label beyond the vocabulary
    first, second, third, fourth = compute_steps(local, [good, (header, buffer), wrong, good])
    assert isinstance(second, HostRefused)
    assert "NaN" in str(second)
    assert isinstance(third, HostRefused)
    assert "vocabulary" in str(third)
    alone = numbers(compute_step(local, *good))
    for reply in (first, fourth):
        assert not isinstance(reply, Exception)
        torch.testing.assert_close(numbers(reply), alone, rtol=1e-4, atol=1e-6)
    unknown = request(local, [4], objective="no-such-loss")
    assert isinstance(compute_steps(local, [unknown])[0], ConfigError)


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


def test_what_waits_together_is_computed_together_in_turns(local: LocalLLM) -> None:
    gated = Gated()
    order: list[str] = []

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=40)

        async def ask(client: str, name: str, lengths: list[int], **header: Any) -> None:
            await batcher.run(*request(local, lengths, **header), client)
            order.append(name)

        tasks = [asyncio.create_task(ask("a", "first", [8]))]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(ask("a", f"a{i}", [8])) for i in range(6)]
        tasks += [asyncio.create_task(ask("b", "b", [8])), asyncio.create_task(ask("c", "long", [30]))]
        tasks += [asyncio.create_task(ask("d", "d", [8], want_gradient=False))]
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(*tasks)

    gated.play(scene)
    # first alone; then five of 8 tokens, a and b in turns; the long one and the other kind go alone.
    assert order[0] == "first"
    assert "b" in order[1:6]
    assert order.index("long") <= 7  # c's turn comes before a's seventh request
    assert gated.stats.get("batched_requests") >= 5
    assert gated.stats.get("batches") <= 6


def test_a_caller_that_leaves_is_not_computed(local: LocalLLM) -> None:
    gated = Gated()

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=100)
        first = asyncio.create_task(batcher.run(*request(local, [8]), "a"))
        await asyncio.sleep(0)
        left, stays = (asyncio.create_task(batcher.run(*request(local, [8]), c)) for c in "bc")
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(first, stays)
        assert left.cancelled()

    gated.play(scene)
    assert gated.stats.get("batches") == 2
    assert gated.stats.get("batched_requests") == 0  # two passes of one request each


def test_what_does_not_fit_into_memory_together_is_computed_alone(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LocalLLM.loss_and_gradient

    def small(self: LocalLLM, embeds: torch.Tensor, *rest: Any) -> Any:
        if len(embeds) > 1:
            raise torch.OutOfMemoryError("too much")
        return whole(self, embeds, *rest)

    monkeypatch.setattr(LocalLLM, "loss_and_gradient", small)
    gated = Gated()

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=100)
        tasks = [asyncio.create_task(batcher.run(*request(local, [8], seed=i), str(i))) for i in range(4)]
        await asyncio.sleep(0)
        gated.gate.set()
        replies = await asyncio.gather(*tasks)
        monkeypatch.undo()
        for i, reply in enumerate(replies):
            torch.testing.assert_close(
                numbers(reply), numbers(compute_step(local, *request(local, [8], seed=i)))
            )
        with pytest.raises(ConfigError):
            StepBatcher(local, gated.pool, gated.stats, batch_tokens=-1)

    gated.play(scene)
    assert gated.stats.get("batches_split") == 1


def test_many_clients_over_the_wire_get_what_they_would_get_alone(local: LocalLLM) -> None:
    wrong: list[str] = []
    with serve(local, batch_tokens=2048, grace=1.0) as host:

        def client(number: int) -> None:
            generator = torch.Generator().manual_seed(number)
            with RemoteLLM(host.address, insecure=True) as llm:
                for _ in range(4):
                    length = int(torch.randint(3, 12, (1,), generator=generator))
                    x = torch.randn(2, length, local.hidden_size, generator=generator, requires_grad=True)
                    mask = torch.ones(2, length, dtype=torch.bool)
                    labels = torch.randint(0, local.vocab_size, (2, length), generator=generator)
                    (there,) = torch.autograd.grad(llm.loss(x, mask, labels).sum(), x)
                    (here,) = torch.autograd.grad(local.loss(x, mask, labels).sum(), x)
                    if not torch.allclose(there, here, rtol=1e-4, atol=1e-6):
                        wrong.append(f"client {number}")

        threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong
        assert host.stats()["batched_requests"] > 0
        deadline = time.monotonic() + 30
        while (
            host.stats()["in_flight"] and time.monotonic() < deadline
        ):  # the last reply is counted after it is sent
            time.sleep(0.01)
        assert host.stats()["step_done"] == 48
        assert host.stats()["in_flight"] == 0
