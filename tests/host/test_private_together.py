"""Label-private steps of several clients in one pass, there and back: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import torch
from gated import Gated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_host import Batch, make_batch, take_step

from fednano.host import RemoteLLM, codec, private_batching, serve
from fednano.host.batching import StepBatcher
from fednano.host.lane import Lane
from fednano.host.private_batching import Halves
from fednano.host.private_compute import (
    Graphs,
    Half,
    check_labelled,
    decode_gradient,
    encode_gradient,
    forward_jobs,
    private_job,
)
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.turns import Ask
from fednano.models.language import LocalLLM
from fednano.models.passes import sample_losses
from fednano.models.private import HiddenStep


class Client:
    """One client's step, as it would come over the wire."""

    def __init__(self, llm: LocalLLM, lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32):
        self.llm, self.batch = llm, make_batch(lengths, seed=seed)
        embeds, self.mask, labels = self.batch
        self.packed, self.data = codec.pack(embeds[self.mask], dtype, lengths)
        keep = labels[self.mask] >= 0
        keep[[0, *torch.tensor(lengths).cumsum(0).tolist()][:-1]] = False
        self.labels = labels[self.mask][keep]
        self.places = keep.nonzero().flatten().tolist()
        self.counts = [int(part.sum()) for part in torch.split(keep, lengths)]
        check_labelled(self.places, lengths)

    def ask(self, forward: Any) -> Ask:
        """Its first half."""
        header = pb.PrivateHeader(embeds=self.packed, labelled=self.places, want_gradient=True)
        return Ask(
            "",
            True,
            self.packed.lengths,
            lambda: private_job(self.llm, header, self.received(self.data)),
            "",
            forward,
        )

    @staticmethod
    def received(data: memoryview) -> codec.Assembler:
        """Bytes as a host has them."""
        buffer = codec.Assembler(len(data), "test")
        buffer.add(data)
        return buffer

    def gradient(self, packed: pb.Packed, data: memoryview) -> torch.Tensor:
        """What the client sends back for its hidden states, over the wire."""
        rows = codec.decode_rows(
            self.received(data).take(len(data)), torch.float32, packed.hidden_size, packed.scale
        )
        leaf = rows.clone().requires_grad_()
        sample_losses(self.llm.part.head, leaf, self.labels, self.counts, "cross_entropy").sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return decode_gradient(*_received(codec.pack(leaf.grad, torch.float32, self.counts)))

    def check(self, half: Half, gradient: torch.Tensor) -> None:
        """The gradient is that of a step alone with the labels."""
        packed, data = encode_gradient(half, gradient, self.packed)
        rows = codec.decode_rows(
            self.received(data).take(len(data)), torch.float32, packed.hidden_size, packed.scale
        )
        expected = take_step(self.llm, self.batch)[1][self.mask]
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)


def _received(sent: tuple[pb.Packed, memoryview]) -> tuple[pb.Packed, codec.Assembler]:
    return sent[0], Client.received(sent[1])


class Scene:
    """A host's batcher and its halves over a pool whose jobs wait at a gate."""

    def __init__(self, llm: LocalLLM, keep: int = 64) -> None:
        self.gated, graphs, lane = Gated(), Graphs(keep), Lane(llm.device)
        self.steps = StepBatcher(llm, self.gated.pool, self.gated.stats, batch_tokens=4096)
        self.forward = partial(forward_jobs, graphs.open)

        async def run(work: Callable[[], Any]) -> Any:
            def job() -> Any:
                with lane.computing():
                    return work()

            return await self.gated.pool.run(job)

        self.halves = Halves(run, graphs, self.gated.stats)

    async def forward_halves(self, clients: list[Client]) -> list[tuple[Half, pb.Packed, memoryview]]:
        """All first halves, those that wait in one pass; nobody has begun."""
        waiting = [
            asyncio.create_task(self.steps.run(client.ask(self.forward), f"c{index}"))
            for index, client in enumerate(clients)
        ]
        await asyncio.sleep(0.01)
        self.gated.gate.set()
        return [await each for each in waiting]

    async def there(self, clients: list[Client]) -> list[tuple[Half, torch.Tensor]]:
        """The same, each begun, and the gradients that the clients make of their hidden states."""
        found = await self.forward_halves(clients)
        for half, _, _ in found:
            self.halves.begin(half)
        return [
            (half, client.gradient(packed, data))
            for client, (half, packed, data) in zip(clients, found, strict=True)
        ]

    def play(self, scene: Callable[[], Awaitable[None]]) -> dict[str, int]:
        """Run it; the counters."""

        async def whole() -> None:
            await scene()
            assert not self.halves._meetings  # nothing stays behind

        self.gated.play(whole)
        return self.gated.stats.snapshot()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(6, 9), min_size=1, max_size=3), min_size=2, max_size=5),
    keep=st.sampled_from([0, 64]),
)
def test_each_gets_what_it_would_get_alone(shapes: list[list[int]], keep: int, local: LocalLLM) -> None:
    scene = Scene(local, keep)
    clients = [Client(local, lengths, seed=index) for index, lengths in enumerate(shapes)]

    async def together() -> None:
        # The first goes alone: nobody waits yet when the worker is free.
        came = await scene.there(clients)
        backs = [asyncio.create_task(scene.halves.backward(half, own)) for half, own in came]
        for client, (half, _), back in zip(clients, came, backs, strict=True):
            client.check(half, await back)
        for half, _ in came:
            scene.halves.leave(half)

    counted = scene.play(together)
    others = len(clients) - 1
    assert counted["batches"] == 2
    assert counted.get("private_step_together", 0) == (others if others > 1 else 0)
    assert counted["private_step_replayed"] == (0 if keep else len(clients))


def test_who_leaves_is_not_waited_for(local: LocalLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_batching, "_LEAST", 60.0)
    monkeypatch.setattr(private_batching, "_MOST", 60.0)
    scene = Scene(local)
    clients = [Client(local, [7], seed=index) for index in range(4)]

    async def one_leaves() -> None:
        came = await scene.there(clients)
        backs = [asyncio.create_task(scene.halves.backward(half, own)) for half, own in came[:3]]
        await asyncio.sleep(0.05)
        assert backs[0].done()  # it went there alone
        assert not backs[1].done()
        scene.halves.leave(came[3][0])
        for client, (half, _), back in zip(clients[:3], came, backs, strict=False):
            client.check(half, await back)
            scene.halves.leave(half)

    assert scene.play(one_leaves)["private_step_together"] == 2


def test_who_leaves_while_it_waits_is_left_out(local: LocalLLM) -> None:
    scene = Scene(local)
    clients = [Client(local, [7], seed=index) for index in range(4)]

    async def one_is_cancelled() -> None:
        came = await scene.there(clients)
        backs = [asyncio.create_task(scene.halves.backward(half, own)) for half, own in came[1:3]]
        await asyncio.sleep(0)
        backs[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await backs[0]
        scene.halves.leave(came[1][0])
        last = scene.halves.backward(*came[3])
        clients[3].check(came[3][0], await last)
        clients[2].check(came[2][0], await backs[1])
        for half, _ in (came[0], *came[2:]):
            scene.halves.leave(half)

    assert scene.play(one_is_cancelled)["private_step_together"] == 2


def test_who_is_late_is_computed_again_alone(local: LocalLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_batching, "_LEAST", 0.02)
    monkeypatch.setattr(private_batching, "_MOST", 0.02)
    scene = Scene(local)
    clients = [Client(local, [7, 6], seed=index) for index in range(4)]

    async def one_is_late() -> None:
        came = await scene.there(clients)
        backs = [asyncio.create_task(scene.halves.backward(half, own)) for half, own in came[:3]]
        for client, (half, _), back in zip(clients[:3], came, backs, strict=False):
            client.check(half, await back)
        clients[3].check(came[3][0], await scene.halves.backward(*came[3]))
        for half, _ in came:
            scene.halves.leave(half)

    counted = scene.play(one_is_late)
    assert (counted["private_step_together"], counted["private_step_replayed"]) == (2, 1)


def test_callers_that_left_before_their_answer_are_forgotten(
    local: LocalLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_batching, "_GRACE", 0.05)
    scene = Scene(local)
    clients = [Client(local, [7], seed=index) for index in range(3)]

    async def one_never_begins() -> None:
        found = await scene.forward_halves(clients)
        for client, (half, packed, data) in zip(
            clients[:2], found, strict=False
        ):  # the third's caller is gone
            scene.halves.begin(half)
            client.check(half, await scene.halves.backward(half, client.gradient(packed, data)))
            scene.halves.leave(half)
        assert len(scene.halves._meetings) == 1
        await asyncio.sleep(0.1)

    scene.play(one_never_begins)


def test_graphs_of_callers_that_all_left_are_let_go(local: LocalLLM) -> None:
    scene = Scene(local)
    clients = [Client(local, [7], seed=index) for index in range(3)]
    steps: list[weakref.ref[HiddenStep]] = []

    async def nobody_begins() -> None:
        found = await scene.forward_halves(clients)
        steps.extend(weakref.ref(half.group.step) for half, _, _ in found if half.group is not None)
        assert len(steps) == 3
        assert all(step() is not None for step in steps)

    scene.play(nobody_begins)
    gc.collect()
    assert [step() for step in steps] == [None, None, None]


def test_what_does_not_fit_together_goes_alone(local: LocalLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(local)
    clients = [Client(local, [7], seed=index) for index in range(3)]
    back = HiddenStep.backward

    def full(self: HiddenStep, gradient: torch.Tensor) -> torch.Tensor:
        if len(self._mask) > 1:
            raise torch.OutOfMemoryError("full")
        return back(self, gradient)

    monkeypatch.setattr(HiddenStep, "backward", full)

    async def too_large() -> None:
        came = await scene.there(clients)
        backs = [asyncio.create_task(scene.halves.backward(half, own)) for half, own in came]
        for client, (half, _), each in zip(clients, came, backs, strict=True):
            client.check(half, await each)
            scene.halves.leave(half)

    assert scene.play(too_large)["private_step_replayed"] == 2


def test_graphs_of_groups_count_their_clients(local: LocalLLM) -> None:
    graphs = Graphs(4)
    steps = []
    for clients in (3, 2, 4):
        x, mask, y = make_batch([5] * clients, seed=clients)
        step = HiddenStep(local.passes, x, mask, torch.where(y >= 0, 0, y))
        step.states(keep=True)
        graphs.add(step, clients)
        steps.append(step)
        assert [each.kept for each in steps] == [False] * (len(steps) - 1) + [True]


def test_many_clients_of_a_host(local: LocalLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    states = HiddenStep.states

    def slow(self: HiddenStep, *, keep: bool) -> torch.Tensor:
        time.sleep(0.05)  # so that others come meanwhile
        return states(self, keep=keep)

    monkeypatch.setattr(HiddenStep, "states", slow)
    wrong: list[str] = []
    with serve(local, batch_tokens=4096) as host:

        def client(seed: int) -> None:
            batches: list[Batch] = [make_batch([7, 8 + seed % 2], seed=10 * seed + turn) for turn in range(3)]
            with RemoteLLM(host.address, insecure=True, head=local.part.head, retry_seconds=20) as llm:
                for batch in batches:
                    for got, want in zip(take_step(llm, batch), take_step(local, batch), strict=True):
                        if not torch.allclose(got, want, rtol=1e-4, atol=1e-6):
                            wrong.append(f"{seed}: {float((got - want).norm())}")

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = host.stats()
    assert not wrong
    assert stats["private_step_done"] == 18
    assert stats["batches"] < 18
    assert stats["private_step_together"] > 0
    assert stats["in_flight"] == stats["buffered_bytes"] == 0
