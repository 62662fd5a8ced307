"""Simulated clients that misbehave: who, what they send, and that the checks name each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.errors import ConfigError
from fednano.federation import asking
from fednano.federation.apps import client_app
from fednano.federation.config import RunConfig
from fednano.federation.exchange import Delivery
from fednano.federation.faults import Fault, check_faults, parse_faults
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.messages import HostTicket, Instruction, Reply
from fednano.federation.misbehaviour import assign, distort
from fednano.federation.tasks import carry_out
from fednano.runs import RunFolder

NAMES = [f"client-{k:03d}" for k in range(10)]


def test_faults_are_read_as_they_are_written() -> None:
    text = "sign-flip:2:4,vanish:0.3,nan:1"
    faults = parse_faults(text)
    assert faults == [Fault("sign-flip", 2, 4.0), Fault("vanish", 0.3), Fault("nan", 1)]
    assert [fault for one in faults for fault in parse_faults(str(one))] == faults
    assert parse_faults("") == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("flip:1", "expected one of"),
        ("nan", "expected KIND:CLIENTS"),
        ("nan:x", "expected KIND:CLIENTS"),
        ("nan:1:2:3", "expected KIND:CLIENTS"),
        ("nan:1:2", "have a strength"),
        ("nan:0.5", "whole number"),
        ("vanish:1", "share above 0 and below 1"),
        ("sign-flip:1:0", "strength above 0"),
        ("sign-flip:1:nan", "strength above 0"),
    ],
)
def test_faults_that_make_no_sense(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RunConfig(faults=text)


def test_somebody_must_be_honest_and_nobody_real() -> None:
    with pytest.raises(ConfigError, match="leave at least one honest"):
        check_faults(parse_faults("nan:2,sign-flip:3"), 5, simulated=True)
    with pytest.raises(ConfigError, match="are for simulations"):
        check_faults(parse_faults("vanish:0.1"), 5, simulated=False)
    check_faults([], 1, simulated=False)


def test_a_client_with_data_of_its_own_does_not_obey() -> None:
    asked = Instruction(RunConfig(), "federated", 1, HostTicket(), False, {"fault": "nan:1"}, {})
    node = {"site": "hospital", "data": "records"}
    reply = Reply.from_records(carry_out("train", asked.to_records(), node))
    assert reply.leaves is None
    assert reply.failure is not None
    assert "only simulated clients" in reply.failure.message


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), number=st.integers(1, 50), flip=st.integers(1, 4), nan=st.integers(1, 4))
def test_who_misbehaves_follows_from_the_seed(seed: int, number: int, flip: int, nan: int) -> None:
    faults = parse_faults(f"sign-flip:{flip},nan:{nan}")
    told = assign(faults, NAMES, seed=seed, round_number=number)
    assert told == assign(faults, NAMES[::-1], seed=seed, round_number=1)  # the same ones in every round
    assert sum("sign-flip" in what for what in told.values()) == flip
    assert sum("nan" in what for what in told.values()) == nan
    absent = assign(parse_faults("vanish:0.3"), NAMES, seed=seed, round_number=number)
    assert len(absent) == 3


def test_others_vanish_in_another_round() -> None:
    vanish = parse_faults("vanish:0.3")
    assert len({tuple(sorted(assign(vanish, NAMES, seed=0, round_number=n))) for n in range(1, 9)}) > 4


@settings(max_examples=25, deadline=None)
@given(strength=st.floats(0.1, 10.0), seed=st.integers(0, 99))
def test_what_a_distorted_change_is(strength: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    started = {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(4, generator=draw)}
    trained = {name: leaf + torch.randn(leaf.shape, generator=draw) for name, leaf in started.items()}

    def sent(kind: str) -> dict[str, torch.Tensor]:
        return distort(Fault(kind, 1, strength), trained, started, draw)

    for name, start in started.items():
        change = trained[name] - start
        torch.testing.assert_close(sent("sign-flip")[name] - start, -strength * change, rtol=1e-4, atol=1e-5)
        noise = sent("noise")[name] - start
        assert float(noise.norm()) == pytest.approx(strength * float(change.norm()), rel=1e-3)
        assert sent("nan")[name].isnan().all()
        assert (sent("huge")[name] == 1e30).all()
        assert torch.equal(sent("stale")[name], trained[name])


def test_every_fault_of_a_run_is_refused_by_name_and_the_rest_is_merged(laboratory: Any) -> None:
    """NaN, 1e30, last round's update, another model's and a vanished client, at once and in every round."""
    settings = {"clients": 6, "alpha": 100.0, "rounds": 2, "min_replies": 1}
    wanted = {"nan": "(nonfinite)", "huge": "(norm)", "stale": "(round)", "foreign": "(basis)"}
    faults = ",".join(f"{kind}:1" for kind in wanted) + ",vanish:0.17"
    with closing(InProcessGrid(client_app, 6)) as grid:
        fed = laboratory.federation(grid, faults=faults, **settings)
        result = laboratory.rounds("fedavg", fed=fed)
    rows = [row for row in fed.folder.metrics() if "refused" in row]
    for number in (1, 2):
        told = assign(parse_faults(faults), list(fed.nodes), seed=0, round_number=number)
        found = {row["client"]: row["refused"] for row in rows if row["round"] == number}
        assert set(found) == set(told)
        for client, fault in told.items():
            assert wanted.get(fault.split(":")[0], "Vanished") in found[client]
    assert all(torch.isfinite(leaf).all() for leaf in result.leaves.values())
    assert not torch.equal(result.leaves["text.B"], laboratory.start["text.B"])


def test_sign_flippers_send_the_opposite_and_the_others_what_they_learned(
    laboratory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sent = asking.exchange, []

    def spy(*args: Any, **kwargs: Any) -> Iterator[Delivery]:
        for delivery in real(*args, **kwargs):
            sent.append(delivery.reply)
            yield delivery

    monkeypatch.setattr(asking, "exchange", spy)
    for faults in ("", "sign-flip:1:3"):
        laboratory.rounds("fedavg", fed=laboratory.federation(clients=3, rounds=1, faults=faults))
    clean, bent = ({reply.client: reply.leaves for reply in part} for part in (sent[:3], sent[3:]))
    (liar,) = assign(parse_faults("sign-flip:1"), list(clean), seed=0, round_number=1)
    for client, leaves in clean.items():
        for name, leaf in leaves.items():
            start, got = laboratory.start[name], bent[client][name]
            want = start - 3 * (leaf - start) if client == liar else leaf
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("faults", ["sign-flip:1", "vanish:0.3"])
def test_a_run_says_who_was_told_to_misbehave(run: Any, faults: str) -> None:
    path = run(faults=faults, rounds=1, samples=4, batch_size=4, final_samples=4)
    told = [e["text"] for e in RunFolder.open(str(path)).events() if e["text"].startswith("simulated fault")]
    assert len(told) == 1
    assert faults.split(":", maxsplit=1)[0] in told[0]
    assert "client" in told[0]
