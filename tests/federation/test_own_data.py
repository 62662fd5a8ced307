"""Data of every kind through a whole run: the metric that fits, per client and global, and losses on answers only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fednano.data import load_dataset
from fednano.errors import DataError, ModelError
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.federation.model import build_edge, connect, load_site_data, partition_samples
from fednano.federation.worker import Worker
from fednano.host import RemoteLLM
from fednano.models.client_part import write_client_part
from fednano.models.files import find_model
from fednano.runs import RunFolder
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

Run = Callable[..., Path]
SHORT = {"clients": 2, "rounds": 1, "samples": 4, "batch_size": 4, "evaluate_every": 1, "streams": "text"}


def reviews(folder: Path) -> Path:
    words = ["red", "blue", "circle", "triangle"]
    rows = [
        f"is it {words[n % 4]} or {words[n // 4 % 4]} ?,{'yes' if n % 3 else 'no'},ward {n % 2}"
        for n in range(60)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "reviews.csv").write_text("\n".join(["text,label,ward", *rows, "short"]) + "\n")
    return folder / "reviews.csv"


def chats(folder: Path) -> Path:
    def row(n: int) -> dict[str, Any]:
        said = [("what is it ?", "a red circle"), ("is it blue ?", "no" if n % 2 else "yes it is blue")]
        turns = [
            {"role": role, "content": text}
            for pair in said
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return {"messages": turns}

    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row(n)) + "\n" for n in range(20)))
    return file


def test_text_classification_divided_by_a_column(run: Run, tmp_path: Path) -> None:
    path = run(**SHORT, dataset=str(reviews(tmp_path / "d")), partition="column", partition_by="ward")
    folder = RunFolder.open(path)
    summary = folder.read_json("summary.json")
    assert (summary["metric"], set(summary["scores"]["federated"])) == (
        "exact-match",
        {"exact-match", "macro-f1"},
    )
    assert summary["test_samples"] == 6
    assert any("1 bad rows were left out" in event["text"] for event in folder.events())
    assert any("reviews.csv:62: has 1 cells, the header 3" in event["text"] for event in folder.events())
    spread = summary["extra"]["on_clients"]
    assert spread["clients"] == 2
    assert spread["worst_client"] in ("client-000", "client-001")
    assert 0 <= spread["low"] <= spread["mean"] <= spread["high"] <= 1
    clients = [row for row in folder.metrics() if row["scope"] == "client" and row.get("final")]
    assert [set(row["scores"]) for row in clients] == [{"exact-match", "macro-f1"}] * 2


def test_conversations_are_judged_by_rouge_and_perplexity(run: Run, tmp_path: Path) -> None:
    file = chats(tmp_path)
    with pytest.raises(Exception, match="answers of instruction data are no classes"):
        run(**SHORT, dataset=str(file))
    path = run(**SHORT, dataset=str(file), partition="iid")
    summary = RunFolder.open(path).read_json("summary.json")
    scores = summary["scores"]["federated"]
    assert summary["metric"] == "rouge-l"
    assert summary["accuracy"]["federated"] == scores["rouge-l"]
    assert scores["perplexity"] > 1
    clients = [row for row in RunFolder.open(path).metrics() if row["scope"] == "client" and row.get("final")]
    assert all(row["scores"]["perplexity"] > 1 for row in clients)


def test_only_the_last_answer_of_a_conversation_is_learnt(tmp_path: Path) -> None:
    data = load_dataset(chats(tmp_path), whole=True)
    edge = build_edge(RunConfig(streams="text", rank=2))
    batch = edge(*ClientData(list(data)[:2], edge, FeatureCache(edge.edge)).batch([0, 1]))
    tokenizer = edge.edge.tokenizer
    learnt = [tokenizer.decode([i for i in row.tolist() if i >= 0]) for row in batch.labels]
    assert [text.split("<")[0].strip() for text in learnt] == ["a red circle", "yes it is blue"]
    assert (
        int(batch.mask[1].sum()) > int(batch.mask[0].sum()) + 3
    )  # the first answer stands in the second's prompt


@pytest.mark.parametrize("kind", ["iid", "linear", "square", "column", "dirichlet"])
def test_every_partition_covers_the_data(kind: str, tmp_path: Path) -> None:
    by = {"partition_by": "ward"} if kind in ("column", "dirichlet") else {}
    config = RunConfig(
        dataset=str(reviews(tmp_path)), partition=kind, clients=2, holdout=0.25, alpha=5.0, **by
    )
    data = load_dataset(config.dataset, options=config.data_settings)
    shares = [partition_samples(config, data, number, 2) for number in range(2)]
    ids = [sample.id for train, held in shares for sample in (*train, *held)]
    assert sorted(ids) == sorted(sample.id for sample in data)
    if kind == "column":
        assert [{s.group for s in train} for train, _ in shares] == [{"ward 0"}, {"ward 1"}]
        with pytest.raises(
            DataError, match=r"has 2 values \(ward 0, ward 1\), and there are to be 3 clients"
        ):
            partition_samples(config.changed(clients=3), data, 0, 3)


def test_a_site_trains_on_all_its_rows_in_its_own_layout(tmp_path: Path) -> None:
    file = tmp_path / "own.csv"
    file.write_text("befund,klasse\n" + "".join(f"text {n},{n % 2}\n" for n in range(20)))
    config = RunConfig(data_options='label="label"')
    data = load_site_data(
        config, str(file), "text-classification", 'text="befund" label="klasse" labels="no,yes"'
    )
    assert (len(data), data.label_names) == (20, ("no", "yes"))
    node = {"site": "ward", "data": str(file), "data-kind": "text-classification",
            "data-options": 'text="befund" label="klasse" labels="no,yes"'}  # fmt: skip
    worker = Worker(config.changed(streams="text"))
    share = worker.share("ward", node, pool=False)
    assert len(share.data) + len(share.held_out) == 20


def test_a_site_needs_no_more_of_the_model_than_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(find_model("tiny").folder, model)
    config = RunConfig(model=str(model), exchange="label-private", streams="text")
    whole = Worker(config)
    write_client_part(str(model), tmp_path / "parts" / "model", head=True)
    shutil.rmtree(model)
    with pytest.raises(ModelError):
        Worker(config)
    monkeypatch.setattr(Worker, "models", tmp_path / "parts")
    worker = Worker(config)
    assert worker.edge.edge.fingerprint == whole.edge.edge.fingerprint
    with connect(config, HostTicket("127.0.0.1:1"), part=worker._part) as llm:
        assert isinstance(llm, RemoteLLM)  # its head came from the part
    monkeypatch.setattr(Worker, "models", tmp_path)
    with pytest.raises(ModelError, match="Ask the operator for it"):
        Worker(config)
