"""Adapters on gathered gradients: gathered once, shipped once, the same for everybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fednano.adapters import Dense
from fednano.errors import RunError
from fednano.federation.answer import answer
from fednano.federation.config import RunConfig
from fednano.federation.gathering import BASIS_FILE, BasisStore, client_gradients, statistics, unflatten
from fednano.federation.model import build_edge, load_data
from fednano.federation.worker import Worker
from fednano.models.edge import NanoEdge
from fednano.models.language import LocalLLM
from fednano.models.load import load_language
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

Run = Callable[..., Path]


def test_lora_sb_runs_on_a_basis_from_the_clients_gradients_and_resumes_on_it(run: Run) -> None:
    first = run(adapter="lora-sb", rounds=1, gather_samples=8)
    basis = load_file(first / BASIS_FILE)
    assert {name.split(".")[0] for name in basis} == {"image", "text"}
    again = run(adapter="lora-sb", rounds=1, gather_samples=8)
    assert (again / BASIS_FILE).read_bytes() == (first / BASIS_FILE).read_bytes()
    assert (again / "adapter.safetensors").read_bytes() == (first / "adapter.safetensors").read_bytes()
    assert answer(str(first), "is there a circle?")
    resumed = run(resume=first.name)
    assert (resumed / "adapter.safetensors").read_bytes() == (again / "adapter.safetensors").read_bytes()


def test_the_summed_parts_are_the_gradient_of_everybodys_loss(small_vqa: Path) -> None:
    config = RunConfig(rank=4, batch_size=5)
    nano = build_edge(config)
    llm = LocalLLM(load_language("tiny"))
    data = ClientData(list(load_data(RunConfig(dataset=str(small_vqa))))[:12], nano, FeatureCache(nano.edge))
    parts = {
        name: client_gradients(nano.edge, llm, data, part, config)
        for name, part in (("b", list(range(7))), ("a", list(range(7, 12))))
    }
    combined = statistics(parts)
    dense = NanoEdge(nano.edge, {"image": Dense(), "text": Dense()}, seed=0)
    batch = dense(*data.batch(range(12)))
    llm.loss(batch.embeds, batch.mask, batch.labels).sum().backward()  # type: ignore[no-untyped-call]
    for stream, found in combined.items():
        expected = dense.layer(stream).theta["D"].grad
        assert expected is not None
        torch.testing.assert_close(found["gradient"].float(), expected, rtol=2e-4, atol=1e-5)


def test_useless_gradients_are_refused_with_the_clients_name() -> None:
    good, bad = {"text": torch.ones(3, 3)}, {"text": torch.full((3, 3), float("nan"))}
    with pytest.raises(RunError, match=r"client b .* not finite"):
        statistics({"a": good, "b": bad})
    with pytest.raises(RunError, match="no sample uses that stream"):
        statistics({"a": {"text": torch.zeros(3, 3)}})


def test_a_site_that_lost_its_basis_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--resume"):
        BasisStore(tmp_path).load("f" * 64)


def test_a_later_process_finds_the_basis_on_disk(settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**(settings | {"adapter": "lora-sb", "cache_dir": str(tmp_path)}))
    try:
        worker = Worker.get(config)
        made = {
            f"{s}.{n}": t for s in worker.edge.layers for n, t in worker.edge.layer(s).export_basis().items()
        }
        changed = {
            name: torch.linalg.qr(torch.randn(t.shape).T)[0].T.contiguous() if name.endswith(".A") else t
            for name, t in made.items()
        }
        worker.install(changed)
        fingerprint = worker.edge.basis_fingerprint()
        Worker.close_current()
        later = Worker.get(config)
        assert later.edge.basis_fingerprint() != fingerprint
        later.require_basis(fingerprint)
        assert later.edge.basis_fingerprint() == fingerprint
        assert unflatten(changed)["image"].keys() == later.edge.layer("image").basis.keys()
    finally:
        Worker.close_current()
