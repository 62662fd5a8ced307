"""Clients that are lost in mid-round and come back: asked again, merged once, and nothing of theirs is done twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given
from hypothesis import strategies as st

from fednano.errors import ConfigError
from fednano.federation import exchange
from fednano.federation.apps import client_app
from fednano.federation.config import RunConfig
from fednano.federation.forgetting import ForgettingGrid
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.introduction import introduce
from fednano.federation.messages import Instruction
from fednano.federation.returning import MOST_REPEATS, Roll
from fednano.federation.rounds import Federation, PhaseResult

VICTIM, NODE = "client-001", 2


class LosingGrid(InProcessGrid):
    """Loses one client in one round, once it has carried out what was asked: the worst moment.

    Args:
        clients: number of clients.
        how: ``"told"``: Flower says that the node is gone. ``"unnoticed"``: nobody says anything, the node is another
            incarnation. ``"twice"``: so it is, but the first reply comes, too, with the second. ``"crashed"``: its
            process died, the node did not. ``""``: nothing happens.
        number: the round.
        times: how often.
        away: how often somebody looks before the node is back.
        what: Flower's type of the message that it is lost with.
        early: it is lost before it does anything, instead.
    """

    def __init__(
        self,
        clients: int,
        how: str,
        number: int = 2,
        times: int = 1,
        away: int = 2,
        what: str = "train",
        early: bool = False,
    ) -> None:
        super().__init__(client_app, clients)
        self._what, self._early = what, early
        self._how, self._number, self._times, self._away = how, number, times, away
        self._lives, self._looks = 0, 0
        self._lost: set[str] = set()
        self._held: list[Message] = []
        self.asked = 0
        """How often the client was asked in that round."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        self._looks -= 1
        return [
            NodeInfo(node_id=node, last_activated_at=str(self._lives if node == NODE else 0))
            for node in self.get_node_ids()
            if node != NODE or self._looks < 0
        ]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        out = []
        for message in super().pull_messages(wanted):
            if message.metadata.reply_to_message_id not in self._lost:
                out.append(message)
            elif self._how == "twice":
                self._held.append(message)
        if any(message.metadata.src_node_id == NODE for message in out):
            out += [held for held in self._held if held.metadata.reply_to_message_id in wanted]
            self._held.clear()
        return out

    def _handle(self, message: Message) -> Message:
        asked = Instruction.from_records(message.content)
        about = message.metadata.message_type == self._what and message.metadata.dst_node_id == NODE
        self.asked += about and asked.round == self._number
        lost = about and asked.round == self._number and self._how and self.asked <= self._times
        reply = message if lost and self._early else super()._handle(message)
        if not lost:
            return reply
        if self._how == "crashed":
            return Message(Error(ErrorCode.CLIENT_APP_CRASHED), reply_to=message)
        self._lives, self._looks = self._lives + 1, self._away
        if self._how == "told":
            return Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
        self._lost.add(message.metadata.message_id)
        return reply


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_LOOK_SECONDS", 0.02)


def run_on(grid: LosingGrid, laboratory: Any, **changes: Any) -> tuple[Federation, PhaseResult]:
    try:
        fed = laboratory.federation(grid, **({"rounds": 3} | changes))
        return fed, laboratory.rounds(fed.config.rule, fed=fed)
    finally:
        grid.close()


def merged(fed: Federation) -> list[tuple[int, str]]:
    rows = [row for row in fed.folder.metrics() if row["scope"] == "client" and "refused" not in row]
    return sorted((row.get("trained_for", row["round"]), row["client"]) for row in rows)


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ("told", {"rule": "scaffold"}),  # control variates on the client's disk
        ("unnoticed", {"codec": "topk", "codec_options": "density=0.2"}),  # what the codec lost is owed
        ("twice", {"rule": "feddpa", "codec": "sign"}),  # a personal adapter as well
        ("twice", {"late": "buffer"}),
        ("crashed", {"rule": "fedsa"}),  # leaves that stay at home
    ],
)
def test_a_client_that_comes_back_is_merged_once_and_the_bits_are_the_same(
    laboratory: Any, how: str, changes: dict[str, Any]
) -> None:
    quiet, expected = run_on(LosingGrid(3, ""), laboratory, **changes)
    grid = LosingGrid(3, how)
    fed, result = run_on(grid, laboratory, **changes)
    assert grid.asked == 2
    everybody = [(number, f"client-{n:03d}") for number in (1, 2, 3) for n in range(3)]
    assert merged(fed) == merged(quiet) == everybody
    assert all(torch.equal(leaf, expected.leaves[name]) for name, leaf in result.leaves.items())
    assert all(torch.equal(leaf, expected.memory[name]) for name, leaf in result.memory.items())
    rows = [row for row in fed.folder.metrics() if row.get("asked_again")]
    assert [(row["round"], row["client"], row["asked_again"]) for row in rows] == [(2, VICTIM, 1)]
    told = [event["text"] for event in fed.folder.events() if "asked again" in event["text"]]
    assert len(told) == 1
    assert f"round 2, {VICTIM}" in told[0]


def test_what_does_not_come_back_is_named_and_taken_again_in_the_next_round(laboratory: Any) -> None:
    fed, _ = run_on(LosingGrid(3, "told", away=10**6, number=2), laboratory, rounds=2, rejoin_timeout=0.1)
    (refused,) = [row for row in fed.folder.metrics() if "refused" in row]
    assert (refused["round"], refused["client"]) == (2, VICTIM)
    assert "NodeLost: its node is not connected" in refused["refused"]
    assert "rejoin-timeout" in refused["refused"]
    fed, _ = run_on(LosingGrid(3, "told", away=3, number=1), laboratory, rounds=2, rejoin_timeout=0.0)
    assert (2, VICTIM) in merged(fed)


def test_what_kills_a_client_each_time_is_given_up(laboratory: Any) -> None:
    grid = LosingGrid(3, "crashed", times=10**6)
    fed, _ = run_on(grid, laboratory)
    assert grid.asked == 1 + MOST_REPEATS
    (refused,) = [row for row in fed.folder.metrics() if "refused" in row]
    assert (refused["round"], refused["client"]) == (2, VICTIM)
    assert (
        f"its process died, and it was not back in time (rejoin-timeout); it was asked {1 + MOST_REPEATS} times"
        in (refused["refused"])
    )


def test_introductions_and_evaluations_are_repeated_too(laboratory: Any) -> None:
    grid = LosingGrid(3, "told", number=0, what="query.hello")
    fed = laboratory.federation(grid)
    try:
        start = {"edge": laboratory.edge, "stop": fed.stop, "start": laboratory.start}
        clients = introduce(ForgettingGrid(grid, fed.folder.path), [1, 2, 3], fed.config, **start)
    finally:
        grid.close()
    assert grid.asked == 2
    assert {name: client.node for name, client in clients.items()} == {
        f"client-{n:03d}": n + 1 for n in range(3)
    }
    grid = LosingGrid(3, "unnoticed", number=1, what="evaluate")
    fed, _ = run_on(grid, laboratory, rounds=1, evaluate_clients_every=1)
    assert grid.asked == 2
    judged = [row["client"] for row in fed.folder.metrics() if "accuracy" in row and row["scope"] == "client"]
    assert sorted(judged) == [f"client-{n:03d}" for n in range(3)]


def test_under_secure_aggregation_a_client_answers_once(laboratory: Any) -> None:
    """Lost before it had masked its update, it is merged; lost after, it drops out rather than to mask another one."""
    secure = {"secure_aggregation": True, "rounds": 2}
    _, expected = run_on(LosingGrid(3, ""), laboratory, **secure)
    fed, result = run_on(LosingGrid(3, "told", early=True), laboratory, **secure)
    assert result.accepted == dict.fromkeys((f"client-{n:03d}" for n in range(3)), 2)
    assert all(torch.equal(leaf, expected.leaves[name]) for name, leaf in result.leaves.items())
    fed, result = run_on(LosingGrid(3, "told"), laboratory, **secure)
    assert result.accepted == {"client-000": 2, VICTIM: 1, "client-002": 2}
    (refused,) = [row for row in fed.folder.metrics() if "refused" in row]
    assert (refused["client"], refused["asked_again"]) == (VICTIM, 1)
    assert "after 3 of its answers" in refused["refused"]


def test_an_answer_to_either_request_closes_both() -> None:
    late = exchange.Outstanding()
    late.leave({"first": "a", "second": "a", "other": "b"}, ["a", "b"], 1, 0.0, 1e9)
    late.leave({"next": "a"}, [], 2, 0.0, 1e9)
    assert late.busy("a")
    assert late.take("second") == ("a", 1, 0.0)
    assert set(late.requests) == {"other", "next"}
    assert not late.busy("a")
    assert late.busy("b")


def test_patience_is_for_those_that_were_there() -> None:
    roll = Roll({"here": 1, "gone": 2}, {1: "a"}, patience=10.0)
    for name in ("here", "gone"):
        roll.sent(name, f"{name}-1")
        roll.lose(f"{name}-1", "lost", now=0.0)
    assert roll.waits(9.0)
    assert not roll.waits(10.0)
    assert roll.returned({2: "b"}, now=1.0) == {"gone": "lost"}  # not waited for, but welcome
    roll.sent("gone", "gone-2")
    assert roll.waits(1e9)
    assert roll.answered("gone") == 1
    assert roll.missing() == {"here": ("lost", 0)}


def test_a_request_that_waits_for_its_node_is_not_sent_twice() -> None:
    roll = Roll({"late": 1}, {}, patience=10.0)
    roll.sent("late", "first")
    assert roll.returned({1: "b"}, now=1.0) == {}
    assert roll.returned({1: "b"}, now=2.0) == {}
    assert roll.returned({1: "c"}, now=3.0) == {"late": "its node went away and came back"}


@given(st.data())
def test_whatever_happens_an_answer_counts_once(data: st.DataObject) -> None:
    """Requests, losses, returns and replies in any order, replies to old requests and to answered ones among them."""
    names = {"a": 1, "b": 2}
    lives, sent, answers = {1: 0, 2: 0}, [], []
    roll = Roll(names, {1: "0", 2: "0"}, patience=5.0)

    def ask(name: str) -> None:
        sent.append(f"{name}{len(sent)}")
        roll.sent(name, sent[-1])

    for name in names:
        ask(name)
    for now in range(data.draw(st.integers(0, 30))):
        what = data.draw(st.sampled_from(["reply", "lose", "die", "look"]))
        request = data.draw(st.sampled_from(sent))
        if what == "die":
            lives[names[request[0]]] += 1
        elif what == "look":
            for name in roll.returned({node: str(life) for node, life in lives.items()}, float(now)):
                assert name not in answers
                ask(name)
        elif (client := roll.client(request)) is not None:
            assert client == request[0]
            if what == "lose":
                roll.lose(request, "lost", float(now))
            else:
                answers.append(client)
                roll.answered(client)
    assert len(answers) == len(set(answers))
    assert set(answers) | set(roll.missing()) == set(names)
    assert set(roll.names.values()) == set(roll.busy()) <= set(names) - set(answers)
    assert len(sent) <= len(names) * (1 + MOST_REPEATS)


def test_a_negative_patience_is_refused() -> None:
    with pytest.raises(ConfigError, match="rejoin-timeout is -1"):
        RunConfig(rejoin_timeout=-1.0)
