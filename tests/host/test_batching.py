"""Steps that share a pass: right, fair, and nobody suffers for another's mistake."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated import Gated, alone, computed_apart, numbers, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fednano.errors import ConfigError, HostRefused
from fednano.host import RemoteLLM, serve
from fednano.host.batching import StepBatcher
from fednano.host.jobs import Reply
from fednano.host.turns import Ask
from fednano.models.language import LocalLLM
from fednano.models.passes import Passes


def together(llm: LocalLLM, asks: list[Ask]) -> list[Reply | Exception]:
    """All in one pass of a host, after a first one that they wait for."""
    gated = Gated()
    replies: list[Reply | Exception] = []

    async def scene() -> None:
        batcher = StepBatcher(llm, gated.pool, gated.stats, batch_tokens=4096)
        first = asyncio.create_task(batcher.run(request(llm, [2]), "first"))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(batcher.run(ask, f"c{index}")) for index, ask in enumerate(asks)]
        await asyncio.sleep(0)
        gated.gate.set()
        await first
        replies.extend(await asyncio.gather(*waiting, return_exceptions=True))  # type: ignore[arg-type]

    gated.play(scene)
    return replies


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=3), min_size=1, max_size=5))
def test_each_reply_equals_that_of_the_lone_request(shapes: list[list[int]], local: LocalLLM) -> None:
    requests = [request(local, lengths, seed=i) for i, lengths in enumerate(shapes)]
    for one, reply in zip(requests, together(local, requests), strict=True):
        assert not isinstance(reply, Exception)
        for got, expected in zip(numbers(reply), alone(local, one), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_bad_request_is_refused_alone(local: LocalLLM) -> None:
    good = request(local, [4, 6])
    nan = request(local, [5], seed=1, spoil=slice(0, 4))
    wrong = request(local, [4], seed=2, spoil=slice(-4, None))  # a label beyond the vocabulary
    first, second, third, fourth = together(local, [good, nan, wrong, good])
    assert isinstance(second, HostRefused)
    assert "NaN" in str(second)
    assert isinstance(third, HostRefused)
    assert "vocabulary" in str(third)
    for reply in (first, fourth):
        assert not isinstance(reply, Exception)
        torch.testing.assert_close(numbers(reply), alone(local, good), rtol=1e-4, atol=1e-6)
    (unknown,) = together(local, [request(local, [4], objective="no-such-loss")])
    assert isinstance(unknown, ConfigError)


def test_what_waits_together_is_computed_together_in_turns(local: LocalLLM) -> None:
    gated = Gated()
    order: list[str] = []

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=40)

        async def ask(client: str, name: str, lengths: list[int], **header: Any) -> None:
            await batcher.run(request(local, lengths, **header), client)
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
        first = asyncio.create_task(batcher.run(request(local, [8]), "a"))
        await asyncio.sleep(0)
        left, stays = (asyncio.create_task(batcher.run(request(local, [8]), c)) for c in "bc")
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(first, stays)
        assert left.cancelled()

    gated.play(scene)
    assert gated.stats.get("batches") == 2
    assert gated.stats.get("batched_requests") == 0  # two passes of one request each


def test_a_short_step_waits_for_clients_that_were_just_answered(local: LocalLLM) -> None:
    """Four clients, each of which asks again as soon as it is answered, end up in one pass instead of two groups."""

    def passes(linger: float) -> int:
        gated = Gated()
        run = gated.pool.run

        async def slow(job: Callable[[], Any]) -> Any:
            return await run(lambda: (time.sleep(0.05), job())[1])  # a pass of a real model

        gated.pool.run = slow  # type: ignore[method-assign]
        gated.gate.set()

        async def scene() -> None:
            batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=512, linger_seconds=linger)

            async def client(name: str, late: float) -> None:
                await asyncio.sleep(late)
                for _ in range(6):
                    await batcher.run(request(local, [8]), name)
                    await asyncio.sleep(0.002)  # it takes a moment to come back

            await asyncio.gather(*(client(str(number), 0.01 * number) for number in range(4)))

        gated.play(scene)
        assert gated.stats.get("waiting") == 0
        return gated.stats.get("batches")

    assert passes(0.02) < passes(0.0)


def test_nobody_waits_for_a_client_that_stays_away(local: LocalLLM) -> None:
    """A client that takes long between its steps is not waited for; one that comes back at once is."""
    gated = Gated()
    run = gated.pool.run

    async def slow(job: Callable[[], Any]) -> Any:
        return await run(lambda: (time.sleep(0.2), job())[1])

    gated.pool.run = slow  # type: ignore[method-assign]
    gated.gate.set()
    pauses: dict[str, float] = {}

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=512, linger_seconds=0.1)
        for away, name in ((0.3, "slow"), (0.002, "fast")):
            for _ in range(2):
                await asyncio.gather(batcher.run(request(local, [8]), name), asyncio.sleep(0))
                await asyncio.sleep(away)
            await batcher.run(request(local, [8]), name)  # answered a moment ago, like each before
            other = asyncio.create_task(batcher.run(request(local, [8]), "other " + name))
            await asyncio.sleep(0)
            pauses[name] = float(batcher._timer is not None)
            await other

    gated.play(scene)
    assert pauses == {"slow": 0.0, "fast": 1.0}


def test_what_does_not_fit_into_memory_together_is_computed_alone(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Passes.compute

    def small(self: Passes, embeds: torch.Tensor, *rest: Any) -> Any:
        if len(embeds) > 1:
            raise torch.OutOfMemoryError("too much")
        return whole(self, embeds, *rest)

    monkeypatch.setattr(Passes, "compute", small)
    gated = Gated()

    async def scene() -> None:
        batcher = StepBatcher(local, gated.pool, gated.stats, batch_tokens=100)
        tasks = [asyncio.create_task(batcher.run(request(local, [8], seed=i), str(i))) for i in range(4)]
        await asyncio.sleep(0)
        gated.gate.set()
        replies = await asyncio.gather(*tasks)
        monkeypatch.undo()
        for i, reply in enumerate(replies):
            torch.testing.assert_close(numbers(reply), alone(local, request(local, [8], seed=i)))
        with pytest.raises(ConfigError):
            StepBatcher(local, gated.pool, gated.stats, batch_tokens=-1)

    gated.play(scene)
    assert gated.stats.get("batches_split") == 1


@pytest.mark.parametrize("apart", [False, True])
def test_many_clients_over_the_wire_get_what_they_would_get_alone(
    local: LocalLLM, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where carrying and computing are done apart, as on a GPU."""
    wrong: list[str] = []
    if apart:
        computed_apart(monkeypatch)
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
