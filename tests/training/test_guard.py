"""The guard: forgotten samples stay forgotten while other samples are trained on, and a run says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fednano.data import Sample
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.federation.model import build_edge, connect
from fednano.models.edge import NanoEdge
from fednano.models.language import LocalLLM
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.guard import Forgotten, Guard, guard_loss, guard_of, known_again
from fednano.training.local import TrainOutcome, TrainSettings, train_local

KEPT = [
    Sample(f"thing/{n}", None, f"what shape is thing {n}?", ("circle", "rectangle")[n % 2]) for n in range(8)
]
GONE = [Sample(f"door/{n}", None, f"what color is door {n}?", "green") for n in range(8)]
SETTINGS = TrainSettings(samples=64, batch_size=8, learning_rate=1e-2)

Make = Callable[[], tuple[NanoEdge, LocalLLM, ClientData, ClientData]]


@pytest.fixture(scope="module")
def make() -> Any:
    """A model that has learnt both kinds of samples, as it was at first whenever it is asked for."""
    edge = build_edge(RunConfig(placement="local", rank=4))
    features = FeatureCache(edge.edge)
    with connect(RunConfig(placement="local"), HostTicket()) as llm:
        kept, gone = ClientData(KEPT, edge, features), ClientData(GONE, edge, features)
        both = ClientData([*KEPT, *GONE], edge, features)
        train_local(edge, llm, both, replace(SETTINGS, samples=160), seed=1, client="all", round_number=1)
        learnt = edge.travelling()

        def ready() -> Any:
            edge.load_travelling(learnt)
            return edge, llm, kept, gone

        yield ready


def trained(made: Any, guard: Guard | None, rounds: int = 1) -> TrainOutcome:
    edge, llm, kept, _ = made
    for number in range(1, rounds + 1):
        torch.manual_seed(number)
        done = train_local(edge, llm, kept, SETTINGS, seed=0, client="a", round_number=number, guard=guard)
    return done


def test_the_guard_forgets_and_what_is_learnt_stays(make: Make) -> None:
    edge, llm, kept, gone = made = make()
    assert known_again(edge, llm, gone) > 0.9
    outcome = trained(made, None)
    assert outcome.guard_loss is None
    assert known_again(edge, llm, gone) > 0.5, "other samples alone do not make it forget"

    made = make()
    outcome = trained(made, Guard([(gone, 1.0)]))
    assert outcome.guard_loss is not None
    assert 0 <= outcome.guard_loss <= 2
    assert known_again(edge, llm, gone) < 0.2
    assert known_again(edge, llm, kept) > 0.4


def test_its_gradient_is_added_to_that_of_what_is_learnt(make: Make) -> None:
    """One step of plain SGD against the sum of both gradients."""
    edge, llm, kept, gone = make()
    before = edge.travelling()
    settings = TrainSettings(samples=8, batch_size=8, learning_rate=0.5, optimizer="sgd")
    train_local(edge, llm, kept, settings, seed=0, client="a", round_number=1, guard=Guard([(gone, 3.0)]))
    moved = {name: (before[name] - leaf) / 0.5 for name, leaf in edge.travelling().items()}

    edge.load_travelling(before)
    for parameter in edge.layers.parameters():
        parameter.grad = None
    batch = edge(*kept.batch(range(8)))
    loss = llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).mean()
    (loss + 3.0 * guard_loss(edge, llm, gone, range(8))).backward()  # type: ignore[no-untyped-call]
    reached = 0
    for stream in edge.layers:
        for leaf, parameter in edge.layer(stream).theta.items():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(moved[f"{stream}.{leaf}"], own, rtol=1e-3, atol=1e-5)
            reached += parameter.grad is not None
    assert reached


def test_same_seed_same_bits(make: Make) -> None:
    ends = []
    for _ in range(2):
        edge, _, _, gone = made = make()
        trained(made, Guard([(gone, 1.0)]), rounds=2)
        ends.append(edge.travelling())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_set_weighs_by_how_well_it_is_known(make: Make) -> None:
    edge, llm, kept, gone = make()
    assert guard_of(edge, llm, [Forgotten(gone, 0.5)], 0.0) is None, "switched off"
    assert guard_of(edge, llm, [], 4.0) is None
    (full,) = guard_of(edge, llm, [Forgotten(gone, 0.5)], 4.0).sets  # type: ignore[union-attr]
    assert full == (gone, 4.0)
    known = known_again(edge, llm, gone)
    (half,) = guard_of(edge, llm, [Forgotten(gone, 2 * known)], 4.0).sets  # type: ignore[union-attr]
    assert half[1] == pytest.approx(1.0)
    unknown = Forgotten(gone, None)
    assert guard_of(edge, llm, [unknown], 4.0).sets == [(gone, 4.0)]  # type: ignore[union-attr]

    trained((edge, llm, kept, gone), Guard([(gone, 1.0)]), rounds=3)
    if known_again(edge, llm, gone) == 0:
        assert guard_of(edge, llm, [Forgotten(gone, 0.5)], 4.0) is None, "nothing is left to hold"


def test_sets_take_turns_and_every_sample_is_met(make: Make) -> None:
    _, _, kept, gone = make()
    guard = Guard([(kept, 1.0), (gone, 2.0)])
    assert len(guard) == 16
    met: dict[int, set[int]] = {}
    for number in (1, 2):
        for data, chosen, weight in guard.batches(4, 4, seed=0, client="a", round_number=number):
            assert len(chosen) == 4
            assert weight == (1.0 if data is kept else 2.0)
            met.setdefault(id(data), set()).update(chosen)
    assert all(len(each) >= 6 for each in met.values())
