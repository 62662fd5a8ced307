"""What goes wrong with updates: refused by name, with the reason, and the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from fednano.federation import exchange
from fednano.federation.apps import client_app
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.messages import Instruction, Reply
from fednano.federation.rounds import Federation, PhaseResult
from fednano.training.seeds import generator

BAD = "client-001"


class TamperingGrid(InProcessGrid):
    """Lets a function change replies to training requests before they are sent; ``None`` from it: the client is gone.

    Args:
        clients: number of clients.
        tamper: gets the request and the reply.
    """

    def __init__(self, clients: int, tamper: Callable[[Instruction, Reply], Reply | None]) -> None:
        super().__init__(client_app, clients)
        self._tamper = tamper

    def _handle(self, message: Message) -> Message:
        asked = Instruction.from_records(message.content)
        reply = super()._handle(message)
        if message.metadata.message_type != "train" or reply.has_error():
            return reply
        changed = self._tamper(asked, Reply.from_records(reply.content))
        if changed is None:
            return Message(Error(code=1, reason="the node is gone"), reply_to=message)
        reply.content = changed.to_records()
        return reply


class HoldingGrid(InProcessGrid):
    """Holds one client's replies back, until the next round's requests or for ever.

    Args:
        clients: number of clients.
        slow: node id of the client.
        release: whether later requests let what is held go.
    """

    def __init__(self, clients: int, slow: int, *, release: bool = True) -> None:
        super().__init__(client_app, clients)
        self._slow, self._release = slow, release
        self._held: dict[str, Message] = {}
        self._free: list[Message] = []
        self.now = 0.0
        """A clock for `fednano.federation.exchange`: it jumps when nothing but held replies is left to wait for."""

    def monotonic(self) -> float:
        return self.now

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        if self._release:
            self._free += self._held.values()
            self._held.clear()
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        out = [message for message in self._free if message.metadata.reply_to_message_id in wanted]
        self._free = [message for message in self._free if message not in out]
        for message in super().pull_messages(wanted):
            if message.metadata.src_node_id == self._slow:
                self._held[message.metadata.reply_to_message_id] = message
            else:
                out.append(message)
        if not out and wanted <= set(self._held):
            self.now += 1e6
        return out


def filled(reply: Reply, value: float) -> Reply:
    assert reply.leaves is not None
    return replace(reply, leaves={name: leaf.fill_(value) for name, leaf in reply.leaves.items()})


def other_shape(reply: Reply) -> Reply:
    assert reply.leaves is not None
    return replace(reply, leaves={name: leaf[None] for name, leaf in reply.leaves.items()})


FAULTS: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "NaN": (lambda reply: filled(reply, float("nan")), "refused (nonfinite)"),
    "1e30": (lambda reply: filled(reply, 1e30), "refused (norm)"),
    "within max-abs, above max-norm": (lambda reply: filled(reply, 99.0), "refused (norm)"),
    "the last round's": (lambda reply: replace(reply, round=reply.round - 1), "refused (round)"),
    "another model's": (
        lambda reply: replace(reply, facts=reply.facts | {"edge": "f" * 64}),
        "refused (basis)",
    ),
    "another adapter's": (lambda reply: replace(reply, facts=reply.facts | {"spec": "x"}), "refused (spec)"),
    "another shape": (other_shape, "refused (schema)"),
    "leaves missing": (lambda reply: replace(reply, leaves={}), "refused (schema)"),
    "weight 0": (lambda reply: replace(reply, metrics=reply.metrics | {"samples": 0.0}), "refused (weight)"),
}


def run_on(grid: Any, laboratory: Any, **changes: Any) -> tuple[Federation, PhaseResult]:
    try:
        fed = laboratory.federation(grid, **changes)
        return fed, laboratory.rounds(fed.config.rule, fed=fed)
    finally:
        grid.close()


def refusals(fed: Federation) -> list[tuple[int, str, str]]:
    return [(r["round"], r["client"], r["refused"]) for r in fed.folder.metrics() if "refused" in r]


def test_each_fault_is_refused_by_name(laboratory: Any) -> None:
    """One fault a round, and what is merged is what the others sent."""
    faults = list(FAULTS.values())

    def tamper(asked: Instruction, reply: Reply) -> Reply:
        return faults[asked.round - 1][0](reply) if reply.client == BAD else reply

    settings = {"rounds": len(faults), "max_norm": 60.0, "max_abs": 100.0}
    fed, result = run_on(TamperingGrid(3, tamper), laboratory, **settings)
    assert [(number, client) for number, client, _ in refusals(fed)] == [
        (n + 1, BAD) for n in range(len(faults))
    ]
    for (_, reason), (_, _, text) in zip(faults, refusals(fed), strict=True):
        assert BAD in text
        assert reason in text
    assert result.accepted == {"client-000": len(faults), "client-002": len(faults)}
    without, clean = run_on(
        TamperingGrid(3, lambda asked, reply: None if reply.client == BAD else reply), laboratory, **settings
    )
    assert all(torch.equal(leaf, clean.leaves[name]) for name, leaf in result.leaves.items())
    assert all("the node is gone" in text for _, _, text in refusals(without))


def test_an_encoded_update_that_is_damaged_is_refused(laboratory: Any) -> None:
    def tamper(asked: Instruction, reply: Reply) -> Reply:
        assert reply.leaves is not None
        if reply.client != BAD:
            return reply
        blob = reply.leaves["payload"]
        return replace(reply, leaves={"payload": blob[:-3].clone()} if asked.round == 1 else {"other": blob})

    fed, _ = run_on(TamperingGrid(3, tamper), laboratory, codec="int8")
    assert [number for number, client, text in refusals(fed) if client == BAD and "(codec)" in text] == [1, 2]


def test_a_third_of_the_clients_vanishes_each_round(laboratory: Any) -> None:
    def gone(asked: Instruction, reply: Reply) -> Reply | None:
        lost = generator(0, "vanish", asked.round).choice(10, size=3, replace=False)
        return None if int(reply.client[-3:]) in lost else reply

    settings = {"clients": 10, "alpha": 100.0, "rounds": 3}
    fed, result = run_on(TamperingGrid(10, gone), laboratory, **settings)
    assert [sum(number == n for number, _, _ in refusals(fed)) for n in (1, 2, 3)] == [3, 3, 3]
    again = run_on(TamperingGrid(10, gone), laboratory, **settings)[1]
    assert all(torch.equal(leaf, again.leaves[name]) for name, leaf in result.leaves.items())
    assert not torch.equal(result.leaves["text.B"], laboratory.start["text.B"])


def test_nobody_valid_ends_with_the_reason(laboratory: Any) -> None:
    from fednano.errors import RunError

    with pytest.raises(RunError, match=r"round 1.*nonfinite"):
        run_on(TamperingGrid(3, lambda asked, reply: filled(reply, float("nan"))), laboratory)


def test_a_merge_that_needs_more_updates_keeps_the_adapters(laboratory: Any) -> None:
    """Bulyan against one malicious client needs seven updates; in round 2 one of the seven is refused."""

    def tamper(asked: Instruction, reply: Reply) -> Reply:
        return filled(reply, float("nan")) if asked.round == 2 and reply.client == BAD else reply

    settings = {"clients": 7, "alpha": 100.0, "rounds": 2, "rule": "bulyan", "rule_options": "malicious=1"}
    fed, result = run_on(TamperingGrid(7, tamper), laboratory, **settings)
    first = fed.folder.load_checkpoint(1).tensors
    assert all(torch.equal(leaf, first[f"leaf.{name}"]) for name, leaf in result.leaves.items())
    assert set(result.accepted.values()) == {1}
    assert any("expected at least 7" in event["text"] for event in fed.folder.events())


def patience(monkeypatch: pytest.MonkeyPatch, grid: HoldingGrid) -> None:
    class Clock:
        monotonic = staticmethod(grid.monotonic)
        sleep = staticmethod(lambda seconds: None)

    monkeypatch.setattr(exchange, "time", Clock)


def test_the_deadline_passes_without_a_slow_client(laboratory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = HoldingGrid(3, slow=2, release=False)
    patience(monkeypatch, grid)
    fed, result = run_on(grid, laboratory)
    assert [(number, client) for number, client, _ in refusals(fed)] == [(1, BAD), (2, BAD)]
    assert all("round-timeout" in text for _, _, text in refusals(fed))
    assert set(result.accepted) == {"client-000", "client-002"}


def test_over_selection_goes_on_with_the_first_and_drops_the_late(laboratory: Any) -> None:
    fed, result = run_on(HoldingGrid(3, slow=2), laboratory, fraction=0.67, over_select=0.5)
    rows = [row for row in fed.folder.metrics() if row["scope"] == "client"]
    first = [row for row in rows if row["round"] == 1]
    assert {row["client"] for row in first} == {"client-000", "client-002"}  # two of three were enough
    late = [row for row in rows if row.get("trained_for") == 1]
    assert [(row["round"], row["client"]) for row in late] == [(2, BAD)]
    assert "late" in late[0]["refused"]
    assert result.accepted.get(BAD) is None


class BunchingGrid(InProcessGrid):
    """Gives out replies together, when all have come."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = all(self._running[key].done() for key in set(message_ids) & set(self._running))
        return list(super().pull_messages(message_ids)) if ready else []


@pytest.mark.parametrize("late", ["drop", "buffer"])
def test_who_comes_together_with_the_last_that_was_needed_is_late(laboratory: Any, late: str) -> None:
    """Flower gives a reply out once: what was pulled when enough had come must not be lost."""
    fed, _ = run_on(BunchingGrid(client_app, 3), laboratory, fraction=0.67, over_select=0.5, late=late)
    rows = [row for row in fed.folder.metrics() if row["scope"] == "client"]
    first = {row["client"] for row in rows if row["round"] == 1}
    ((left, refused),) = [(row["client"], "refused" in row) for row in rows if row.get("trained_for") == 1]
    assert first | {left} == {"client-000", BAD, "client-002"}
    assert left not in first
    assert refused == (late == "drop")


def test_a_buffered_update_counts_by_its_age(laboratory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedBuff: the late change lands on the current adapter with the weight (1 + age) ** -exponent."""
    replies: list[Reply] = []

    def keep(asked: Instruction, reply: Reply) -> Reply:
        replies.append(reply)
        return reply

    class Grid(TamperingGrid, HoldingGrid):
        def __init__(self) -> None:
            HoldingGrid.__init__(self, 3, 2)
            self._tamper = keep

    grid = Grid()
    settings = {"fraction": 0.67, "over_select": 0.5, "late": "buffer", "staleness": 0.5}
    fed, result = run_on(grid, laboratory, **settings)
    rows = [
        r for r in fed.folder.metrics() if r["scope"] == "client" and r["round"] == 2 and "refused" not in r
    ]
    assert (BAD, 1) in {(row["client"], row.get("trained_for", 2)) for row in rows}
    assert result.accepted[BAD] == 1
    sent = {(reply.client, reply.round): reply for reply in replies}
    before = {1: laboratory.start}
    before[2] = {n.removeprefix("leaf."): t for n, t in fed.folder.load_checkpoint(1).tensors.items()}
    for name, got in result.leaves.items():
        total, weight = torch.zeros(got.shape, dtype=torch.float64), 0.0
        for row in rows:
            number = row.get("trained_for", 2)
            reply = sent[row["client"], number]
            assert reply.leaves is not None
            share = reply.metrics["samples"] * (1 + 2 - number) ** -0.5
            total += share * (reply.leaves[name].double() - before[number][name].double())
            weight += share
        want = before[2][name].double() + total / weight
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-7)
