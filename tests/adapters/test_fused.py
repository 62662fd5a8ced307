"""Adapters and losses give the same through the kernels as without them, and say when they do not use them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fednano.adapters import AdapterLayer, Site, create
from fednano.adapters.fused import kernels_for
from fednano.errors import ConfigError

CASES: list[tuple[str, dict[str, Any]]] = [
    ("nano", {"rank": 4, "scale": 0.5}),
    ("nano", {"rank": 4, "act": "gelu"}),
    ("lora", {"rank": 3, "alpha": 6.0}),
    ("ffa", {"rank": 3}),
    ("lora-xs", {"rank": 4}),
    ("svfit", {"rank": 4}),
]


def layer_at(kind: str, name: str, options: dict[str, Any]) -> AdapterLayer:
    torch.manual_seed(0)
    base = nn.Linear(12, 12) if kind == "linear" else None
    layer = AdapterLayer(create(name, **options), Site("s", kind, 12, 12), seed=0, base=base)  # type: ignore[arg-type]
    with torch.no_grad():
        for leaf in layer.theta.values():
            leaf.add_(0.3 * torch.randn(leaf.shape))
    return layer


def results(layer: AdapterLayer, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    layer.zero_grad()
    out.square().sum().backward()
    return [out.detach(), x.grad, *(leaf.grad for leaf in layer.theta.values())]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", ["bridge", "linear"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_through_the_kernels_as_without(
    kind: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fednano_kernels

    used: list[str] = []
    for operator in ("nano_adapter", "lora_linear"):
        real = getattr(fednano_kernels, operator)
        monkeypatch.setattr(
            fednano_kernels,
            operator,
            lambda *a, real=real, op=operator, **k: used.append(op) or real(*a, **k),
        )
    layer, x = (
        layer_at(kind, name, options),
        torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)),
    )
    monkeypatch.setenv("FEDNANO_KERNELS", "off")
    plain = results(layer, x)
    assert not used
    monkeypatch.setenv("FEDNANO_KERNELS", "on")
    fused = results(layer, x)
    expected = {"bridge": ["nano_adapter"], "linear": ["lora_linear"] * (options.get("act") != "gelu")}[kind]
    assert used == expected
    for got, want in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["cross_entropy", "gradient_ascent", "inverted_hinge"])
def test_the_loss_over_the_head(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fednano_kernels

    from fednano.models.language import LocalLLM
    from fednano.models.load import load_language

    llm = LocalLLM(load_language("tiny"))
    x = torch.randn(2, 7, llm.hidden_size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.bool)
    labels = torch.randint(0, llm.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    labels[:, :4] = -100
    monkeypatch.setenv("FEDNANO_KERNELS", "off")
    plain = llm.loss_and_gradient(x, mask, labels, objective, True)
    used = []
    real = fednano_kernels.linear_token_loss
    monkeypatch.setattr(fednano_kernels, "linear_token_loss", lambda *a, **k: used.append(1) or real(*a, **k))
    monkeypatch.setenv("FEDNANO_KERNELS", "on")
    fused = llm.loss_and_gradient(x, mask, labels, objective, True)
    assert used == [1]
    for got, want in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_by_default_a_cpu_runs_plain_torch_and_a_typing_error_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FEDNANO_KERNELS", raising=False)
    assert kernels_for(torch.ones(3)) is None
    monkeypatch.setenv("FEDNANO_KERNELS", "on")
    assert kernels_for(torch.ones(3)) is not None
    assert kernels_for(torch.ones(3, dtype=torch.float64)) is None
    monkeypatch.setenv("FEDNANO_KERNELS", "fast")
    with pytest.raises(ConfigError, match="auto, off, on"):
        kernels_for(torch.ones(3))


def test_the_triton_code_itself_under_the_interpreter() -> None:
    """In a process of its own: the interpreter must be chosen before triton is imported."""
    script = """
import os, torch
from fednano.adapters import AdapterLayer, Site, create
layer = AdapterLayer(create("nano", rank=4), Site("s", "bridge", 16, 16), seed=0)
with torch.no_grad():
    layer.theta["B"].normal_(generator=torch.Generator().manual_seed(0))
outs = []
for mode in ("off", "on"):
    os.environ["FEDNANO_KERNELS"] = mode
    x = torch.arange(48.0).view(3, 16).div(48).requires_grad_()
    y = layer(x); layer.zero_grad(); y.square().sum().backward()
    outs.append([y.detach(), x.grad, layer.theta["A"].grad.clone(), layer.theta["B"].grad.clone()])
for a, b in zip(*outs): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr
