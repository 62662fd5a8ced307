"""Rounds under secure aggregation with real clients: the same merge, of which the server sees the sum only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message

from fednano.errors import ConfigError, RunError
from fednano.federation import asking, secure
from fednano.federation.apps import client_app
from fednano.federation.config import RunConfig
from fednano.federation.exchange import Delivery
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.model import client_name
from fednano.federation.rounds import PhaseResult
from fednano.federation.schedules import fit_rank


class FaultyGrid(InProcessGrid):
    """Clients that fall silent at one exchange of each round, or whose requests are changed on the way."""

    def __init__(self, clients: int, silent: dict[int, str], twist: Any = None) -> None:
        super().__init__(client_app, clients)
        self.silent, self.twist = silent, twist
        self.requests: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            asked = message.content.config_records.get("secure", ConfigRecord())
            if self.silent.get(message.metadata.dst_node_id) == asked.get("stage", "none"):
                del message.content["task"]  # the client crashes on it
            if self.twist is not None:
                self.twist(message)
            self.requests.append(message)
            sent.append(message)
        return super().push_messages(sent)


@pytest.fixture
def faulty(laboratory: Any) -> Iterator[Any]:
    grids: list[FaultyGrid] = []

    def start(silent: dict[int, str], twist: Any = None, **changes: Any) -> Any:
        grids.append(FaultyGrid(changes.get("clients", 3), silent, twist))
        return laboratory.federation(grids[-1], secure_aggregation=True, **changes)

    yield start
    for grid in grids:
        grid.close()


def same(first: PhaseResult, second: PhaseResult) -> bool:
    return all(torch.equal(leaf, second.tuned[name]) for name, leaf in first.tuned.items())


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("fisher", {"rounds": 1}),
        ("scaffold", {}),
        ("fedsa", {}),
        ("nested", {"rounds": 1, "client_ranks": "2,4"}),
        ("fedavgm", {"rule_options": 'over="fisher"'}),
        ("rolora", {"fraction": 0.67}),
    ],
)
def test_a_secure_run_ends_at_the_plain_runs_bits(
    rule: str, changes: dict[str, Any], laboratory: Any
) -> None:
    results = []
    for secure_aggregation in (False, True):
        fit_rank(laboratory.edge, laboratory.start)
        results.append(laboratory.rounds(rule, secure_aggregation=secure_aggregation, **changes))
    plain, hidden = results
    fit_rank(laboratory.edge, laboratory.start)
    assert same(plain, hidden)
    assert all(torch.equal(tensor, hidden.memory[name]) for name, tensor in plain.memory.items())
    assert hidden.accepted == plain.accepted
    assert hidden.loss == pytest.approx(plain.loss)


def test_the_server_is_sent_masks_and_no_number_of_a_single_client(
    laboratory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Delivery] = []
    for module in (asking, secure):
        real = module.exchange

        def spy(*args: Any, real: Any = real, **kwargs: Any) -> Iterator[Delivery]:
            for delivery in real(*args, **kwargs):
                seen.append(delivery)
                yield delivery

        monkeypatch.setattr(module, "exchange", spy)
    fed = laboratory.federation(rule="fisher", secure_aggregation=True, rounds=1)
    laboratory.rounds("fisher", fed=fed)
    updates = [d.reply for d in seen if "masked" in (d.reply.leaves or {})]
    assert len(updates) == 3
    assert all(reply.fisher is None and set(reply.leaves or {}) == {"masked"} for reply in updates)
    assert not {"loss", "samples", "steps", "initial-loss"} & {key for d in seen for key in d.reply.metrics}
    rows = [row for row in fed.folder.metrics() if row["scope"] == "client"]
    assert rows
    assert not any("loss" in row or "samples" in row for row in rows)
    # No secret of the session is left on a client's disk.
    assert not list(Path(fed.config.cache_dir).rglob(f"{fed.folder.id}/**/secure-aggregation.json"))


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "reveal"])
def test_a_client_that_drops_out_costs_its_own_update_only(stage: str, faulty: Any, laboratory: Any) -> None:
    fed = faulty({2: stage}, rounds=1)
    result = laboratory.rounds(fed=fed)
    left = [0, 1, 2] if stage == "reveal" else [0, 2]  # its masked update had come
    assert result.accepted == {client_name(n): 1 for n in left}
    grid = FaultyGrid(3, {} if stage == "reveal" else {2: "none"})  # "none": the plain request to train
    try:
        plain = laboratory.rounds(fed=laboratory.federation(grid, rounds=1))
    finally:
        grid.close()
    assert same(plain, result)


@pytest.mark.parametrize("stage", ["shares", "reveal"])
def test_below_the_threshold_nothing_is_merged(stage: str, faulty: Any, laboratory: Any) -> None:
    fed = faulty({1: stage, 2: stage})
    with pytest.raises(RunError, match="no client delivered a valid update"):
        laboratory.rounds(fed=fed)
    events = (fed.folder.path / "events.jsonl").read_text()
    assert "Nothing was added up" in events


def test_a_client_answers_each_exchange_once(faulty: Any, laboratory: Any) -> None:
    """A second request for a masked update under the same masks would give the server a difference in the clear."""
    fed = faulty({}, rounds=1)
    laboratory.rounds(fed=fed)
    grid = fed.grid
    (update,) = [m for m in grid.requests if m.metadata.message_type == "train"][:1]
    (again,) = grid.send_and_receive(
        [Message(update.content, dst_node_id=update.metadata.dst_node_id, message_type="train")]
    )
    assert json.dumps(dict(again.content["head"])).count("ProtocolError") == 1
    assert "leaves" not in again.content


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rule": "krum"}, "update in the clear"),
        ({"rule": "flexlora"}, "Rules that fit: fedadagrad"),
        ({"codec": "int8"}, "codec 'int8'"),
        ({"late": "buffer"}, "late"),
        ({"clients": 1}, "at least 2 clients"),
        ({"fraction": 0.1}, "at least 2 clients"),
        ({"baselines": True}, "baselines"),
        ({"adapter": "lora-sb"}, "gradients that clients send in the clear"),
    ],
)
def test_what_needs_single_updates_is_refused_at_start(
    changes: dict[str, Any], reason: str, run: Any
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(secure_aggregation=True, **changes)


def test_the_threshold_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"secure-threshold is 0\.5"):
        RunConfig(secure_threshold=0.5)
