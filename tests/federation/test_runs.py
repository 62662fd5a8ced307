"""Whole runs, in this process: what they leave behind, and that the same seed gives the same bits."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fednano.errors import (
    ConfigError,
    DataError,
    HostUnavailable,
    Interrupted,
    ModelError,
    RunError,
    TrainingDiverged,
)
from fednano.federation import participation
from fednano.federation.answer import answer
from fednano.federation.apps import client_app
from fednano.federation.config import RunConfig
from fednano.federation.exchange import Stop
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.model import build_edge, client_name, load_data, partition_samples
from fednano.federation.server import run_server
from fednano.runs import QuietView, RunFolder, make_view
from fednano.training.data import draw

Run = Callable[..., Path]


def adapter_bytes(path: Path) -> bytes:
    return (path / "adapter.safetensors").read_bytes()


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_behind(run: Run) -> None:
    path = run(evaluate_every=1, evaluate_samples=8)
    for name in (
        "config.json",
        "metrics.jsonl",
        "partition.json",
        "predictions.json",
        "summary.json",
        "report.html",
        "adapter.safetensors",
        "adapter.json",
        "checkpoints/round-0001",
        "checkpoints/round-0002",
    ):
        assert (path / name).exists(), name
    assert (path.parent / "latest").resolve() == path.resolve()
    summary = json.loads((path / "summary.json").read_text())
    assert summary["parameters"]["trainable"] == 2 * 2 * 4 * 160  # two streams, A and B, rank 4, width 160
    assert summary["rounds"] == 2
    assert summary["clients"] == 3
    payload = summary["parameters"]["trainable"] * 4
    for direction in ("up", "down"):
        counted = summary["bytes"][f"adapter_{direction}_per_client_round"]
        assert payload < counted < payload + 1500
    rows = metrics(path)
    clients = [row for row in rows if row["scope"] == "client" and row.get("loss") is not None]
    assert {(row["round"], row["client"]) for row in clients} == {
        (r, f"client-{c:03d}") for r in (1, 2) for c in range(3)
    }
    assert [row["round"] for row in rows if row["scope"] == "global" and "train_loss" in row] == [1, 2]
    partition = json.loads((path / "partition.json").read_text())
    assert sum(map(sum, partition["counts"].values())) == sum(partition["samples"].values())
    images = [row["image"] for row in json.loads((path / "predictions.json").read_text())]
    assert images
    assert all((path / image).is_file() for image in images)


def test_same_seed_same_bytes_and_another_seed_not(run: Run) -> None:
    first, second, other = run(rule="fisher"), run(rule="fisher"), run(rule="fisher", seed=1)
    assert adapter_bytes(first) == adapter_bytes(second) != adapter_bytes(other)


class ShuffledGrid(InProcessGrid):
    """Holds replies back and delivers them in a random order."""

    def __init__(self, clients: int, seed: int) -> None:
        super().__init__(client_app, clients)
        self._random = random.Random(seed)
        self._held: dict[str, Message] = {}
        self._wanted = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        self._random.shuffle(sent)
        self._wanted = len(sent)
        return super().push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message in super().pull_messages(message_ids):
            self._held[message.metadata.reply_to_message_id] = message
        if len(self._held) < self._wanted:
            return []
        replies = list(self._held.values())
        self._held.clear()
        self._random.shuffle(replies)
        return replies


@pytest.mark.parametrize("rule", ["fedavg", "fisher"])
def test_the_order_of_replies_does_not_matter(rule: str, run: Run, settings: dict[str, Any]) -> None:
    expected = adapter_bytes(run(rule=rule))
    grid = ShuffledGrid(settings["clients"], 1)
    try:
        path = run_server(grid, RunConfig(**settings, rule=rule), view=make_view("quiet"))
    finally:
        grid.close()
    assert adapter_bytes(path) == expected


def tokens_trained_on(config: RunConfig) -> tuple[int, int]:
    """Tokens of all samples that all clients train on in a run, image tokens included, and the steps they take."""
    edge, dataset = build_edge(config).edge, load_data(config)
    image_tokens = 16
    tokens = steps = 0
    for number in range(config.clients):
        mine, _ = partition_samples(config, dataset, number, config.clients)
        drawn = draw(
            len(mine), config.rounds * config.samples, seed=config.seed, client=client_name(number), start=0
        )
        for index in drawn:
            prompt = edge.prompt(mine[index].question, mine[index].answer)
            tokens += len(prompt.ids) - 1 + image_tokens + len(prompt.answer)
        steps += config.rounds * -(-config.samples // config.batch_size)
    return tokens, steps


def test_a_run_through_the_host_equals_the_run_without(run: Run, settings: dict[str, Any]) -> None:
    local, split = run(rule="fisher"), run(rule="fisher", placement="split")
    assert adapter_bytes(split) == adapter_bytes(local)  # to the bit, so well within 1e-6
    summary = json.loads((split / "summary.json").read_text())
    # Counted on the wire, and what arithmetic says: float32 rows up, with an int32 label each, and float32 rows down; a
    # header a step, and a few bytes around each message.
    config = RunConfig(**settings, rule="fisher")
    tokens, steps = tokens_trained_on(config)
    samples = config.clients * config.rounds * config.samples
    for direction, row in (("up", 160 * 4 + 4), ("down", 160 * 4)):
        counted = summary["bytes"][f"activation_{direction}_per_sample_step"] * samples
        assert tokens * row < counted < tokens * row + 400 * steps
    answers = [json.loads((path / "predictions.json").read_text()) for path in (local, split)]
    assert [row["federated"] for row in answers[0]] == [row["federated"] for row in answers[1]]


class StopsAfter(QuietView):
    """Asks the run to end once a round is merged, as Ctrl-C would."""

    def __init__(self, stop: Stop, number: int) -> None:
        super().__init__()
        self._stop_event, self._last = stop, number

    def round_done(self, number: int, **values: Any) -> None:
        if number == self._last:
            self._stop_event.set("interrupted by Ctrl-C.")


def interrupted_run(settings: dict[str, Any], after: int, **changes: Any) -> RunFolder:
    stop = Stop()
    grid = InProcessGrid(client_app, settings["clients"])
    try:
        with pytest.raises(Interrupted, match=r"interrupted by Ctrl-C.*--resume"):
            run_server(grid, RunConfig(**settings, **changes), view=StopsAfter(stop, after), stop=stop)
    finally:
        grid.close()
    return RunFolder.open("latest", root=settings["runs_dir"])


def test_an_interrupted_run_resumes_to_the_same_bits(run: Run, settings: dict[str, Any]) -> None:
    settings["rounds"] = 3
    whole = run(rule="fisher")
    broken = interrupted_run(settings, after=2, rule="fisher")
    assert broken.checkpoints() == [1, 2]
    assert not (broken.path / "adapter.safetensors").exists()
    resumed = run(resume=broken.path.name)
    assert resumed == broken.path
    assert adapter_bytes(resumed) == adapter_bytes(whole)
    assert (resumed / "report.html").exists()


def test_resume_of_an_unknown_run(run: Run) -> None:
    with pytest.raises(RunError, match="no run 'yesterday'"):
        run(resume="yesterday")


def test_one_failing_client_does_not_stop_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = participation.train_local

    def diverges(*args: Any, **kwargs: Any) -> Any:
        if kwargs["client"] == "client-001":
            raise TrainingDiverged("client client-001, round 1, step 1: the loss is nan")
        return real(*args, **kwargs)

    monkeypatch.setattr(participation, "train_local", diverges)
    path = run()
    refused = [row for row in metrics(path) if "refused" in row]
    assert [(row["client"], row["round"]) for row in refused] == [("client-001", 1), ("client-001", 2)]
    assert all("TrainingDiverged" in row["refused"] for row in refused)
    assert "TrainingDiverged" in (path / "report.html").read_text()


def test_a_crashing_client_does_not_stop_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = participation.train_local

    def crashes(*args: Any, **kwargs: Any) -> Any:
        if kwargs["client"] == "client-002":
            raise ZeroDivisionError("a defect")
        return real(*args, **kwargs)

    monkeypatch.setattr(participation, "train_local", crashes)
    refused = [row for row in metrics(run()) if "refused" in row]
    assert {row["client"] for row in refused} == {"client-002"}
    assert all("ZeroDivisionError" in row["refused"] for row in refused)


def test_nan_loss_ends_with_advice(run: Run) -> None:
    with pytest.raises(RunError, match=r"round 1.*TrainingDiverged.*Lower the learning rate"):
        run(learning_rate=1e10, scale=1e35)
    with pytest.raises(RunError, match=r"bound on absolute values is 100\. Lower the learning rate"):
        run(learning_rate=1e10)


def test_too_few_valid_updates_keep_the_adapters(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = participation.train_local

    def diverges(*args: Any, **kwargs: Any) -> Any:
        if kwargs["client"] != "client-000":
            raise TrainingDiverged("no")
        return real(*args, **kwargs)

    monkeypatch.setattr(participation, "train_local", diverges)
    folder = RunFolder.open(run(min_replies=2))
    leaves = [folder.load_checkpoint(number).tensors for number in (1, 2)]
    assert all(leaves[0][name].equal(leaves[1][name]) for name in leaves[0])


def test_baselines_are_run_and_compared(run: Run) -> None:
    path = run(baselines=True)
    summary = json.loads((path / "summary.json").read_text())
    assert set(summary["accuracy"]) == {"zero_shot", "federated", "fisher", "local_only", "centralised"}
    phases = {row["phase"] for row in metrics(path)}
    assert {"local-only", "centralised", "fisher"} <= phases
    alone = [
        row
        for row in metrics(path)
        if row["phase"] == "local-only" and row.get("final") and row["scope"] == "client"
    ]
    assert len(alone) == 3
    pooled = [row for row in metrics(path) if row["phase"] == "centralised" and row["scope"] == "client"]
    assert all(row["samples"] == 3 * 24 for row in pooled)


def test_a_part_of_the_clients_takes_part(run: Run) -> None:
    path = run(fraction=0.34, rounds=4, baselines=True)
    rows = [row for row in metrics(path) if row["scope"] == "client" and "loss" in row]
    tuned = {name: [row for row in rows if row["phase"] == name] for name in ("federated", "local-only")}
    assert len(tuned["federated"]) == 4
    assert len({row["client"] for row in tuned["federated"]}) > 1
    # The bounds train no more than the federation does: the same clients alone, or as many samples in one place.
    visits = {name: [(row["round"], row["client"], row["samples"]) for row in tuned[name]] for name in tuned}
    assert visits["local-only"] == visits["federated"]
    assert [row["samples"] for row in rows if row["phase"] == "centralised"] == [24] * 4


def test_generate_answers_with_the_tuned_model(run: Run, small_vqa: Path) -> None:
    path = run()
    rows = json.loads((path / "predictions.json").read_text())
    for row in rows[:4]:
        got = answer(str(path), row["question"], image=path / row["image"], max_new_tokens=3)
        assert got == row["federated"]
        before = answer(str(path), row["question"], image=path / row["image"], max_new_tokens=3, untuned=True)
        assert before == row["zero_shot"]
    with pytest.raises(DataError, match=r"nowhere\.png"):
        answer(str(path), "what is it?", image=small_vqa / "nowhere.png")
    with pytest.raises(ConfigError, match="question is empty"):
        answer(str(path), " ")


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"clients": 400}, RunError, r"more clients \(400\) than samples \(160\)"),
            ({"model": "no-such/model"}, ModelError, "no model 'no-such/model'"),
            ({"adapter": "lore"}, ConfigError, "lore"),
            ({"rank": 161}, ConfigError, "rank"),
            ({"rule": "fedavgg"}, ConfigError, "fedavgg"),
            ({"rule": "fedex", "adapter": "shira"}, ConfigError, "rule 'fedex'"),
            ({"rule": "scaffold", "codec": "sign"}, ConfigError, "cannot bear codec 'sign'"),
            ({"rule": "flexlora", "client_ranks": "2,4", "baselines": True}, ConfigError, "rule 'fisher'"),
            ({"rule": "rolora", "late": "buffer"}, ConfigError, "late ones cannot be buffered"),
            ({"rule": "fisher", "rule_options": "flor=1"}, ConfigError, "no option flor"),
            ({"adapter_options": "alpha=8"}, ConfigError, "no option 'alpha'"),
            ({"alpha": 0.01, "clients": 20}, (DataError, RunError), "alpha"),
            ({"dataset": "/no/such/folder"}, (DataError, RunError), "no/such/folder"),
            (
                {"host_address": "127.0.0.1:9", "placement": "split", "host_retry": 0.5},
                HostUnavailable,
                "127.0.0.1:9",
            ),
        ],
    )
    def test_is_named(self, run: Run, changes: dict[str, Any], error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            run(**changes)

    def test_an_image_that_does_not_decode(self, run: Run, small_vqa: Path, tmp_path: Path) -> None:
        copy = tmp_path / "data"
        shutil.copytree(small_vqa, copy)
        broken = sorted((copy / "images").glob("test-*"))[0]
        broken.write_bytes(b"not a picture")
        with pytest.raises(DataError, match=broken.name):
            run(dataset=str(copy), cache_dir=str(tmp_path / "cache"))

    def test_bad_rows_are_told(self, run: Run, small_vqa: Path, tmp_path: Path) -> None:
        copy = tmp_path / "data"
        shutil.copytree(small_vqa, copy)
        for split in ("train", "test"):
            with (copy / f"{split}.jsonl").open("a") as file:
                file.write('{"image": "gone.png", "question": "what?", "answer": "red"}\n')
        events = (run(dataset=str(copy)) / "events.jsonl").read_text()
        assert events.count("gone.png") == 2
        assert "train.jsonl:161" in events
        assert "test.jsonl:25" in events


@pytest.mark.parametrize("adapter", ["lora-xs", "shira"])
def test_other_adapters_run_too(adapter: str, run: Run) -> None:
    summary = json.loads((run(adapter=adapter) / "summary.json").read_text())
    payload = summary["parameters"]["trainable"] * 4
    assert payload < summary["bytes"]["adapter_up_per_client_round"] < payload + 1500
