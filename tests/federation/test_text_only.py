"""A whole run on a text-only model, through a host and without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fednano.errors import ModelError
from fednano.exporting import export_run
from fednano.federation.config import RunConfig
from fednano.federation.simulation import simulate
from fednano.models.files import find_model
from fednano.runs import make_view


@pytest.fixture
def words(tmp_path: Path) -> dict[str, Any]:
    """A small Llama with the embedded model's tokenizer, and questions without images."""
    model, data = tmp_path / "model", tmp_path / "data"
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(model)
    for file in find_model("tiny").folder.iterdir():
        if "token" in file.name:
            (model / file.name).write_bytes(file.read_bytes())
    data.mkdir()
    for split, count in (("train", 60), ("test", 8)):
        rows = [{"question": f"is {i % 7} red?", "answer": ("yes", "no")[i % 2]} for i in range(count)]
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return {
        "model": str(model),
        "dataset": str(data),
        "streams": "text",
        "clients": 2,
        "alpha": 50.0,
        "rounds": 1,
        "samples": 16,
        "batch_size": 8,
        "rank": 4,
        "evaluate_every": 0,
        "runs_dir": str(tmp_path / "runs"),
        "cache_dir": str(tmp_path / "features"),
    }


def test_a_text_only_model_is_tuned_and_a_host_changes_no_bit(words: dict[str, Any]) -> None:
    tuned = []
    for placement in ("local", "split"):
        run = simulate(RunConfig(**words, placement=placement), backend="inprocess", view=make_view("quiet"))
        summary = json.loads((run / "summary.json").read_text())
        assert summary["parameters"]["edge"] < summary["parameters"]["model"]
        tuned.append((run / "adapter.safetensors").read_bytes())
    assert tuned[0] == tuned[1]
    with pytest.raises(
        ModelError, match="is text-only; its adapter can be exported with --format safetensors"
    ):
        export_run(str(run), "peft", runs_dir=Path(words["runs_dir"]))


def test_a_lossless_wire_carries_fewer_bytes_to_the_same_adapter(words: dict[str, Any]) -> None:
    tuned, moved = [], []
    for lossless in (False, True):
        config = RunConfig(**words, wire_dtype="bfloat16", wire_lossless=lossless)
        run = simulate(config, backend="inprocess", view=make_view("quiet"))
        tuned.append((run / "adapter.safetensors").read_bytes())
        sizes = json.loads((run / "summary.json").read_text())["bytes"]
        moved.append([sizes[f"activation_{way}_per_sample_step"] for way in ("up", "down")])
    assert tuned[0] == tuned[1]
    assert all(coded < 0.85 * plain for plain, coded in zip(*moved, strict=True))


def test_labels_that_stay_at_the_clients_change_nothing(words: dict[str, Any]) -> None:
    tuned = []
    for exchange in ("full", "label-private"):
        run = simulate(RunConfig(**words, exchange=exchange), backend="inprocess", view=make_view("quiet"))
        tuned.append(load_file(run / "adapter.safetensors"))
    for name, tensor in tuned[0].items():
        torch.testing.assert_close(tuned[1][name], tensor, rtol=1e-4, atol=1e-6)
