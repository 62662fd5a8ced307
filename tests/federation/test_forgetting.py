"""After an unlearning commit: no later round trains on what is forgotten, or merges what was made before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

from fednano.errors import RunError
from fednano.federation import client_task
from fednano.federation.config import RunConfig
from fednano.federation.forgetting import ForgettingGrid, resume_point
from fednano.federation.messages import HostTicket, Instruction, Reply
from fednano.federation.model import load_data, partition_samples
from fednano.federation.simulation import simulate
from fednano.runs import RunFolder, make_view
from fednano.runs.tombstones import PENDING, Tombstone, Tombstones, sample_hash, write_tombstones

Run = Callable[..., Path]
SALT = "ab" * 32


def ids_of(settings: dict[str, Any], client: int) -> list[str]:
    config = RunConfig(**settings)
    train, held = partition_samples(config, load_data(config), client, config.clients)
    return [sample.id for sample in (*train, *held)]


def forget(
    path: Path, ids: list[str], *, site: str = "client-001", epoch: int = 1
) -> dict[str, torch.Tensor]:
    """What a commit leaves behind: tombstones, and an adapter that no round has made."""
    folder = RunFolder(path)
    leaves, info = folder.load_adapter()
    changed = {name: torch.full_like(leaf, 0.01) for name, leaf in leaves.items()}
    folder.save_adapter(changed, {key: value for key, value in info.items() if key != "sha256"})
    hashes = frozenset(sample_hash(SALT, each) for each in ids)
    write_tombstones(path, Tombstones(epoch, (Tombstone("u0001", site, SALT, hashes),)))
    return changed


@pytest.fixture(scope="module")
def finished(small_vqa: Path, features_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests work on copies of it."""
    runs = tmp_path_factory.mktemp("finished")
    made = {**_small(small_vqa, features_dir, runs), "rounds": 1}
    return simulate(RunConfig(**made), backend="inprocess", view=make_view("quiet"))


def _small(small_vqa: Path, features_dir: Path, runs: Path) -> dict[str, Any]:
    return {
        "dataset": str(small_vqa),
        "clients": 3,
        "alpha": 5.0,
        "samples": 4,
        "batch_size": 4,
        "rank": 4,
        "holdout": 0.0,
        "evaluate_every": 0,
        "final_samples": 4,
        "placement": "local",
        "runs_dir": str(runs),
        "cache_dir": str(features_dir),
    }


@pytest.fixture
def settings(small_vqa: Path, features_dir: Path, runs_dir: Path) -> dict[str, Any]:
    return _small(small_vqa, features_dir, runs_dir)


@pytest.fixture
def parent(finished: Path, runs_dir: Path) -> Path:
    return Path(shutil.copytree(finished, runs_dir / "parent"))


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Client -> ids of the samples that it could draw from, in any round after this fixture."""
    seen: dict[str, set[str]] = {}
    real = client_task.contribute

    def watched(worker: Any, instruction: Any, llm: Any, data: Any, *rest: Any, **named: Any) -> Any:
        seen.setdefault(named["client"], set()).update(sample.id for sample in data.samples)
        return real(worker, instruction, llm, data, *rest, **named)

    monkeypatch.setattr(client_task, "contribute", watched)
    return seen


def test_a_run_started_from_another_leaves_out_what_that_forgot(
    run: Run, settings: dict[str, Any], parent: Path, trained_on: dict[str, set[str]]
) -> None:
    gone = ids_of(settings, 1)[:5]
    committed = forget(parent, gone)
    child = run(rounds=1, start_from=str(parent), learning_rate=1e-9)
    assert set(trained_on) == {"client-000", "client-001", "client-002"}
    for ids in trained_on.values():
        assert ids
        assert not ids & set(gone)
    leaves, _ = RunFolder(child).load_adapter()
    for name, leaf in leaves.items():  # it began where the parent's commit ended
        assert torch.allclose(leaf, committed[name], atol=1e-6)
    assert RunFolder(child).load_checkpoint().state["tombstones"] == 1


def test_resuming_goes_on_from_the_committed_adapter_and_not_from_an_older_checkpoint(
    run: Run, parent: Path
) -> None:
    committed = forget(parent, ["x"])
    start = {name: torch.zeros_like(leaf) for name, leaf in committed.items()}
    assert run(resume=str(parent)) == parent
    leaves, _ = RunFolder(parent).load_adapter()
    assert all(leaves[name].equal(leaf) for name, leaf in committed.items())
    assert resume_point(RunFolder(parent), start).epoch == 0  # the checkpoint's; the round loop catches up
    shutil.rmtree(parent / "checkpoints")  # purged
    point = resume_point(RunFolder(parent), start)
    assert (point.epoch, point.rounds) == (1, 1)
    assert all(point.leaves[name].equal(leaf) for name, leaf in committed.items())


def test_updates_from_before_a_commit_are_refused_and_training_goes_on_from_it(
    run: Run, settings: dict[str, Any], parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ids_of(settings, 0)[:3]
    real, calls = client_task.contribute, []

    def overtaken(worker: Any, instruction: Any, *rest: Any, **named: Any) -> Any:
        done = real(worker, instruction, *rest, **named)
        calls.append((instruction.round, {name: leaf.clone() for name, leaf in instruction.leaves.items()}))
        if len(calls) == 1:  # the commit happens while the first client of round 1 trains
            (folder,) = [
                p for p in parent.parent.iterdir() if p.is_dir() and not p.is_symlink() and p != parent
            ]
            child = RunFolder(folder)
            child.save_adapter(*RunFolder(parent).load_adapter())
            committed.append(forget(folder, gone, site="client-000"))
        return done

    committed: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(client_task, "contribute", overtaken)
    child = run(rounds=2, start_from=str(parent), fraction=1.0, min_replies=1)
    rows = RunFolder(child).metrics()
    refused = [row for row in rows if row.get("round") == 1 and "refused" in row]
    assert len(refused) == 3
    assert "those of epoch 1 are in force" in refused[0]["refused"]
    second = [leaves for number, leaves in calls if number == 2]
    assert len(second) == 3
    assert all(leaves[name].equal(leaf) for leaves in second for name, leaf in committed[0].items())


def test_a_client_that_withdrew_everything_takes_no_part(
    run: Run, settings: dict[str, Any], parent: Path, trained_on: dict[str, set[str]]
) -> None:
    forget(parent, ids_of(settings, 1))
    child = run(rounds=1, start_from=str(parent))
    assert set(trained_on) == {"client-000", "client-002"}
    assert any("client-001 has withdrawn" in event["text"] for event in RunFolder(child).events())
    forget(parent, [each for client in range(3) for each in ids_of(settings, client)])
    with pytest.raises(RunError, match="every client has withdrawn"):
        run(rounds=1, start_from=str(parent))


def test_an_unfinished_commit_and_a_misfit_stop_training(run: Run, parent: Path) -> None:
    path = parent
    with pytest.raises(RunError, match="its spec is"):
        run(rounds=1, start_from=str(path), rank=2)
    (path / PENDING).parent.mkdir(exist_ok=True)
    (path / PENDING).write_text("{}")
    for start in ({"resume": str(path)}, {"start_from": str(path)}):
        with pytest.raises(RunError, match="Finish it first: fednano unlearn run"):
            run(**start)


class _Inner:
    """Keeps what is pushed, and answers with what it is given."""

    def __init__(self) -> None:
        self.pushed: list[Message] = []
        self.replies: list[Message] = []

    def push_messages(self, messages: Any) -> list[str]:
        self.pushed = list(messages)
        return []

    def pull_messages(self, ids: Any) -> list[Message]:
        return self.replies


def _instruction() -> RecordDict:
    return Instruction(RunConfig(), "federated", 1, HostTicket(), False, {}, {}).to_records()


class TestGrid:
    @pytest.fixture
    def grid(self, tmp_path: Path) -> ForgettingGrid:
        hashes = frozenset(sample_hash(SALT, each) for each in ("a/1", "a/2"))
        write_tombstones(tmp_path, Tombstones(3, (Tombstone("u0001", "one", SALT, hashes),)))
        grid = ForgettingGrid(_Inner(), tmp_path)  # type: ignore[arg-type]
        assert grid.know({"one": 11, "two": 22}, simulated=False) == ["one"]
        return grid

    def send(self, grid: ForgettingGrid, node: int) -> Instruction:
        message = Message(_instruction(), dst_node_id=node, message_type="train")
        grid.push_messages([message])
        return Instruction.from_records(grid._inner.pushed[0].content)  # type: ignore[attr-defined]

    def receive(self, grid: ForgettingGrid, node: int, facts: dict[str, str]) -> Reply:
        request = Message(_instruction(), dst_node_id=node, message_type="train")
        message = Message(Reply("c", 1, {}, facts).to_records(), reply_to=request)
        message.metadata.__dict__["_src_node_id"] = node
        grid._inner.replies = [message]  # type: ignore[attr-defined]
        (checked,) = grid.pull_messages([])
        return Reply.from_records(checked.content)

    def test_other_clients_are_not_told_what_is_forgotten(self, grid: ForgettingGrid) -> None:
        assert [each.site for each in self.send(grid, 11).tombstones.sets] == ["one"]
        other = self.send(grid, 22).tombstones
        assert (other.epoch, other.sets) == (3, ())

    def test_replies_must_show_that_they_used_the_tombstones_in_force(self, grid: ForgettingGrid) -> None:
        told = self.send(grid, 11).tombstones
        assert self.receive(grid, 11, {"tombstones": told.digest}).failure is None
        stale = Tombstones(2, told.sets).digest
        for facts in ({}, {"tombstones": stale}, {"tombstones": Tombstones(3).digest}):
            failure = self.receive(grid, 11, facts).failure
            assert failure is not None
            assert failure.kind == "UpdateRefused"
            assert "those of epoch 3 are in force" in failure.message
        failed = Reply.failed("c", 1, RunError("x")).to_records()
        assert Reply.from_records(failed).failure is not None

    def test_a_damaged_file_stops_training(self, grid: ForgettingGrid, tmp_path: Path) -> None:
        (tmp_path / "unlearning/tombstones.json").write_text('{"epoch": 1}')
        with pytest.raises(RunError, match="tombstones are damaged"):
            self.send(grid, 11)


def test_tombstones_survive_their_forms() -> None:
    one = Tombstone("u1", "s", SALT, frozenset({sample_hash(SALT, "x")}))
    both = Tombstones(2, (one, Tombstone("u2", "t", "cd" * 32, frozenset())))
    assert Tombstones.from_json(both.to_json()) == both
    assert both.digest != both.for_site("s").digest
