"""A whole run on a folder with a multimodal model, and what `fednano doctor` says of it before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from multimodal_folders import KINDS, save

from fednano.data import load_dataset
from fednano.federation.checkup import check_all, check_data, check_model
from fednano.federation.config import RunConfig
from fednano.federation.model import build_edge
from fednano.federation.simulation import simulate
from fednano.runs import make_view
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

IN_DEFAULT = ("idefics3", "qwen2_vl")


def of_kinds(quick: tuple[str, ...]) -> Any:
    marks = [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in KINDS]
    return pytest.mark.parametrize("kind", marks)


@of_kinds(IN_DEFAULT)
def test_doctor_counts_the_tokens_of_each_image(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    config = RunConfig(**settings | {"model": str(tmp_path / "model"), "placement": "split"})
    assert {check.status for check in check_all(config)} <= {"ok", "note"}
    _, sizes = check_model(config)
    _, lengths = check_data(config, sizes)
    edge, data = build_edge(config), load_dataset(config.dataset)
    chosen = [place * len(data) // 64 for place in range(64)]
    batch = edge(*ClientData(data, edge, FeatureCache(edge.edge)).batch(chosen))
    assert lengths == batch.mask.sum(dim=1).tolist()


@of_kinds(("qwen2_vl",))
def test_a_run_through_a_host_ends_at_the_bits_of_one_without(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    save(kind, tmp_path / "model")
    changes = {
        "model": str(tmp_path / "model"),
        "rounds": 1,
        "samples": 16,
        "evaluate_every": 0,
        "final_samples": 4,
    }
    tuned = []
    for placement in ("local", "split"):
        config = RunConfig(**settings | changes | {"placement": placement})
        run = simulate(config, backend="inprocess", view=make_view("quiet"))
        summary = json.loads((run / "summary.json").read_text())
        assert 0 < summary["parameters"]["edge"] < summary["parameters"]["model"]
        tuned.append((run / "adapter.safetensors").read_bytes())
    assert tuned[0] == tuned[1]
