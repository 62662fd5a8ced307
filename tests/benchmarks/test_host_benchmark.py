"""What the host's benchmark reads off its rows, and its passes on the small shape."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import host_model
from host_faults import WRONG, differences
from host_gates import gates
from host_wire import exchanges
from safetensors.torch import save_file

from fednano.host import RemoteLLM, serve
from fednano.host.drive import Load, batch_of
from fednano.models.language import LocalLLM

SHAPE = host_model.TINY


@pytest.fixture(scope="module")
def model() -> Any:
    return host_model.build(SHAPE)


def test_gates_take_the_plain_host_and_the_best_pass() -> None:
    short, _, long = SHAPE.lengths

    def clients(name: str, engine: str, tokens: int, rate: float) -> dict[str, Any]:
        row = {"section": "clients", "name": name, "engine": engine, "clients": 8, "tokens": float(tokens)}
        return row | {"steps_per_second": rate}

    rows: list[dict[str, Any]] = [
        clients("one at a time", "plain", short, 10.0),
        clients("together", "plain", short, 49.0),
        clients("together", "compiled", short, 500.0),
        {"section": "pass", "name": "plain", "samples": 16, "tokens": long, "useful_tflops": 400.0},
        {"section": "pass", "name": "compiled", "samples": 16, "tokens": long, "useful_tflops": 500.0},
        {"section": "pass", "name": "plain, within 1 GB", "samples": 8, "tokens": long, "peak_gb": 25.0},
        *(
            {"section": "path", "engine": engine, "turn": turn, "tokens": long, "ratio": ratio}
            for engine, ratios in (("plain", (0.95, 0.80, 0.70)), ("compiled", (0.85, 0.50, 0.90)))
            for turn, ratio in enumerate(ratios)
        ),
        {"section": "bytes", "name": "full", "bytes_per_sample_step": 310.0},
        {"section": "bytes", "name": "factored", "bytes_per_sample_step": 10.0},
        {"section": "fault", "name": "lost", "wrong": 1, "errors": 0, "memory_over_base": 1.0},
        {"section": "failed", "name": "client", "error": "no"},
    ]
    found = {gate.name: gate for gate in gates(rows, SHAPE)}
    assert found[f"8 clients of 1 at {short} tokens: together over one at a time"].value == pytest.approx(4.9)
    assert found[f"8 clients over TLS at {long} tokens over the same batch in process"].value == 0.85
    assert found[f"useful TFLOP/s at 16 x {long}"].value == 500
    assert found[f"peak GB at 8 x {long}"].met
    assert found["bytes, full over factored, rank 4, batch 8"].value == pytest.approx(31)
    assert not found["lost: wrong gradients"].met
    assert len(found) == 8
    assert gates([], SHAPE) == []


def test_both_passes_compute_the_same_thing(model: Any) -> None:
    """The peer that is measured must do the same work: one loss over the same tokens, one gradient."""
    embeds, mask, labels = host_model.inputs(SHAPE, 3, 12, 12)
    x = embeds.detach().requires_grad_()
    loss = model(inputs_embeds=x, labels=labels, use_cache=False).loss
    (want,) = torch.autograd.grad(loss, x)
    llm = LocalLLM(host_model.part_of(model))
    losses, got = llm.passes.compute(embeds, mask, labels, "cross_entropy", True)
    assert got is not None
    torch.testing.assert_close(losses.mean(), loss.detach())
    torch.testing.assert_close(got / 3, want)
    assert host_model.useful_parameters(model) == sum(p.numel() for p in model.model.layers.parameters()) + (
        model.model.norm.weight.numel() + model.lm_head.weight.numel()
    )
    row = host_model.row(model, "name", 2, 10, 0.5)
    assert row["useful_tflops"] == pytest.approx(4 * host_model.useful_parameters(model) * 20 / 0.5 / 1e12)


def test_bytes_are_those_on_the_wire(model: Any) -> None:
    llm = LocalLLM(host_model.part_of(model))
    with serve(llm) as host:

        def connect(**options: Any) -> RemoteLLM:
            return RemoteLLM(host.address, insecure=True, **options)

        sizes = {row["name"]: row for row in exchanges(SHAPE, connect, model.lm_head)}
    tokens, width, rank = SHAPE.lengths[2], SHAPE.width, SHAPE.rank
    full = tokens * (2 * width + 1) * 4  # rows both ways, labels one way
    factored = 2 * (tokens * rank + 2 * rank * width / 8) * 4
    assert sizes["full"]["bytes_per_sample_step"] == pytest.approx(full, rel=0.02)
    assert sizes["factored"]["bytes_per_sample_step"] == pytest.approx(factored, rel=0.05)
    assert sizes["factored"]["once_per_sample"] == pytest.approx(tokens * (width * 4 + 5), rel=0.02)
    assert sizes["full"]["once_per_sample"] == 0
    private = (2 * tokens + 2 * 8) * width * 4  # rows and, of 8 labelled places, hidden states, both ways
    assert sizes["label-private"]["bytes_per_sample_step"] == pytest.approx(private, rel=0.02)


def test_a_gradient_of_another_sample_counts_as_wrong(model: Any, tmp_path: Path) -> None:
    llm = LocalLLM(host_model.part_of(model))
    load = Load("nowhere", (12, 12))
    for client, other in ((0, 0), (1, 0)):
        inputs = batch_of(llm.hidden_size, llm.vocab_size, load, other)
        _, gradient = llm.passes.compute(*inputs, "cross_entropy", True)
        assert gradient is not None
        save_file({"gradient": gradient}, tmp_path / f"{client}.safetensors")
    right, wrong = differences(llm, SHAPE, load, tmp_path)
    assert right < 1e-4
    assert wrong > WRONG
