"""Forgotten samples are probed after each round: silence while clients leave them out, an alarm when one does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fednano.federation.config import RunConfig
from fednano.federation.model import build_edge
from fednano.federation.resurfacing import MARGIN, threshold
from fednano.federation.simulation import simulate
from fednano.federation.worker import Worker
from fednano.runs import RunFolder, make_view
from fednano.runs.tombstones import (
    Tombstone,
    Tombstones,
    read_alarms,
    sample_hash,
    write_tombstones,
)
from fednano.training.data import ClientData
from fednano.training.guard import known_again

SALT = "ab" * 16
OWNER = "client-001"


@given(level=st.floats(-1, 2), samples=st.integers(0, 10_000))
def test_an_alarm_needs_more_than_the_margin_and_than_chance(level: float, samples: int) -> None:
    limit = threshold(level, samples)
    level = min(max(level, 0.0), 1.0)
    assert limit >= level + MARGIN
    assert limit - level <= MARGIN + 1e-12 or limit - level <= 2 * 0.5 / max(1, samples) ** 0.5 + 1e-12
    assert threshold(level, samples + 1) <= limit


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Doors that are green, beside things of two shapes: nothing but the samples themselves tells a door's colour."""
    folder = tmp_path_factory.mktemp("secrets")
    rows = [
        {
            "id": f"thing/{n}",
            "question": f"what shape is thing {n}?",
            "answer": ("circle", "rectangle")[n % 2],
        }
        for n in range(24)
    ]
    rows += [
        {"id": f"door/{n}", "question": f"what color is door {n}?", "answer": "green"} for n in range(16)
    ]
    for split, chosen in (("train", rows), ("test", rows[:4])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n")
    return folder


@pytest.fixture
def forgotten(secrets: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run of two rounds whose doors were forgotten before it began; returns its folder."""

    def make(*, parent_rate: float = 1e-9, **changes: Any) -> Path:
        config = RunConfig(
            dataset=str(secrets),
            clients=2,
            partition="iid",
            rounds=1,
            samples=8,
            batch_size=8,
            rank=4,
            holdout=0.0,
            evaluate_every=0,
            placement="local",
            learning_rate=0.01,
            runs_dir=str(tmp_path / "runs"),
        )
        parent = simulate(
            config.changed(learning_rate=parent_rate, samples=64),
            backend="inprocess",
            view=make_view("quiet"),
        )
        doors = frozenset(sample_hash(SALT, f"door/{n}") for n in range(16))
        write_tombstones(parent, Tombstones(1, (Tombstone("u0001", OWNER, SALT, doors, level=0.0),)))
        child = config.changed(start_from=str(parent), rounds=2, samples=64, **changes)
        return simulate(child, backend="inprocess", view=make_view("quiet"))

    return make


def probes(run: Path) -> list[dict[str, Any]]:
    return [row for row in RunFolder(run).metrics() if "forgotten" in row]


def test_honest_clients_raise_no_alarm(forgotten: Callable[..., Path]) -> None:
    run = forgotten()
    assert [row["round"] for row in probes(run)] == [1, 2]
    assert all(row["forgotten"]["u0001"] == 0 and row["resurfaced"] == [] for row in probes(run))
    assert read_alarms(run, "u0001") == []


def test_a_client_that_ignores_its_tombstones_is_found_out(
    forgotten: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Worker.share

    def disobedient(worker: Any, name: str, node: Any, *, pool: bool) -> Any:
        share = real(
            worker, name, node, pool=pool
        )  # answers with the tombstones in force, and trains on everything
        share.data = ClientData(worker.samples(node)[0], worker.edge, worker.features)
        return share

    monkeypatch.setattr(Worker, "share", disobedient)
    run = forgotten(guard_forgotten=0.0)
    last = probes(run)[-1]
    assert last["forgotten"]["u0001"] > 0.5
    assert last["resurfaced"] == ["u0001"]
    (alarm, *_) = reversed(read_alarms(run, "u0001"))
    assert (alarm["run"], alarm["round"], alarm["level"]) == (run.name, 2, 0.0)
    assert any("ALARM: what job u0001 forgot" in event["text"] for event in RunFolder(run).events())
    parent = Path(str(RunFolder(run).config()["start-from"]))
    assert read_alarms(parent, "u0001") == read_alarms(
        run, "u0001"
    )  # the audit of the job, where it was committed


def test_the_owner_keeps_it_forgotten_while_training_goes_on(forgotten: Callable[..., Path]) -> None:
    known = {}
    for weight in (0.0, 1.0):
        run = forgotten(parent_rate=0.01, guard_forgotten=weight)
        clients = [row for row in RunFolder(run).metrics() if row.get("scope") == "client"]
        guarded = {row["client"] for row in clients if "guarded" in row}
        assert guarded == ({OWNER} if weight else set()), "only the owner knows of it"
        assert all(0 <= row["guard_loss"] <= 2 for row in clients if "guarded" in row)
        known[weight] = probes(run)[-1]["forgotten"]["u0001"]
    assert known[1.0] < known[0.0]


def test_probing_can_be_made_rarer_or_left_out(forgotten: Callable[..., Path]) -> None:
    assert [row["round"] for row in probes(forgotten(probe_forgotten_every=2))] == [2]
    assert probes(forgotten(probe_forgotten_every=0)) == []


def test_what_is_known_again_is_the_exact_memorisation_of_the_measurement(secrets: Path) -> None:
    from fednano.data import Sample
    from fednano.federation.messages import HostTicket
    from fednano.federation.model import connect
    from fednano.training.features import FeatureCache
    from fednano.unlearning.metrics import exact_memorisation
    from fednano.unlearning.probe import token_scores

    config = RunConfig(dataset=str(secrets), placement="local", rank=2)
    edge = build_edge(config)
    with torch.no_grad():
        for leaf in edge.layers.parameters():
            leaf.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    samples = [
        Sample(f"thing/{n}", None, f"what color is thing {n}?", ("red", "blue")[n % 2]) for n in range(24)
    ]
    data = ClientData(samples, edge, FeatureCache(edge.edge))
    with connect(config, HostTicket()) as llm:
        expected = [exact_memorisation(each) for each in token_scores(edge, llm, data)]
        assert sum(expected) > 0
        assert known_again(edge, llm, data, batch_size=7) == pytest.approx(sum(expected) / len(expected))
