"""Benchmark cases of K2 lora_linear and K3 grouped_adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from fednano_kernels import (
    grouped_adapter,
    grouped_adapter_reference,
    lora_linear,
    lora_linear_reference,
    nano_adapter,
)
from torch import Tensor

from benchmarks.kernels_adapters import BF16, MODES, randn, with_backward
from benchmarks.kernels_report import Report
from benchmarks.kernels_timing import Variant, measure, sets_for

# M, d_in, d_out, r
LORA_SHAPES = [
    (8192, 4096, 4096, 16),
    (8192, 4096, 4096, 64),
    (8192, 4096, 11008, 16),
    (2048, 4096, 4096, 16),
    (1024, 4096, 4096, 16),
    (16384, 1024, 1024, 16),
]
CLIENTS, TOKENS, WIDTH = 64, 128, 4096


def _peft(weight: Tensor, r: int) -> Callable[..., Tensor] | None:
    """PEFT's LoRA layer over the same frozen weight, where it is installed; its A and B are its own."""
    if importlib.util.find_spec("peft") is None:
        print("  PEFT is not installed; left out")
        return None
    try:
        peft = importlib.import_module("peft")
        model = torch.nn.Sequential(
            torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=BF16, device="cuda")
        )
        model[0].weight.data = weight
        config = peft.LoraConfig(
            r=r, lora_alpha=r, target_modules=["0"], lora_dropout=0.0, init_lora_weights=False
        )
        layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        for p in layer.parameters():
            p.data = p.data.to(BF16)
    except Exception as error:
        print(f"  PEFT cannot be used: {type(error).__name__}: {str(error)[:200]}")
        return None
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run(x: Tensor, grad: Tensor) -> Any:
        return torch.autograd.grad(layer(x), [x, *trained], grad)

    return run


def _lora_case(report: Report, m: int, k: int, n: int, r: int) -> dict[str, dict[str, float]]:
    """Ratios to the frozen linear alone, by mode."""
    sets = min(4, sets_for((m * k + 2 * m * n) * 2))
    weight = randn(n, k, scale=k**-0.5)
    a, b = randn(r, k, scale=k**-0.5).requires_grad_(), randn(n, r, scale=0.1).requires_grad_()
    xs, grads = [randn(m, k).requires_grad_() for _ in range(sets)], [randn(m, n) for _ in range(sets)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, a, b: lora_linear_reference(x, weight, a, b), dynamic=False)
    inputs = [[x, a, b] for x in xs]
    variants: dict[str, Variant] = {
        "frozen linear": with_backward(
            lambda x: torch.nn.functional.linear(x, weight), [[x] for x in xs], grads
        ),
        "fused": with_backward(lambda x, a, b: lora_linear(x, weight, a, b), inputs, grads),
        "eager": with_backward(lambda x, a, b: lora_linear_reference(x, weight, a, b), inputs, grads),
        "compile": with_backward(compiled, inputs, grads),
    }
    if (peer := _peft(weight, r)) is not None:
        variants["PEFT"] = lambda i: peer(xs[i], grads[i])
    return {
        mode: report.row(
            "K2 lora_linear", f"M={m} {k}->{n} r={r}", "forward+backward", mode,
            measure(variants, sets, graph=graph, rounds=9), base="frozen linear",
        )
        for mode, graph in MODES.items()
    }  # fmt: skip


def lora_cases(report: Report) -> None:
    """K2: against the frozen linear alone, and against PEFT."""
    found = {shape: _lora_case(report, *shape) for shape in LORA_SHAPES}
    for mode in MODES:
        first = found[8192, 4096, 4096, 16][mode]
        report.gate(f"K2_lora_over_frozen_linear_M8192_d4096_r16_{mode}", first["fused"], 1.15, "<=")
    if "PEFT" not in found[8192, 4096, 4096, 16]["eager"]:
        return
    # Launches are what small batches pay for, so these two are stated for plain calls, without a graph.
    for shape in ((2048, 4096, 4096, 16), (1024, 4096, 4096, 16)):
        ratios = found[shape]["eager"]
        report.gate(f"K2_lora_speedup_over_peft_M{shape[0]}", ratios["PEFT"] / ratios["fused"], 1.5, ">=")
    ratios = found[16384, 1024, 1024, 16]["eager"]
    report.gate("K2_lora_speedup_over_peft_M16384_d1024", ratios["PEFT"] / ratios["fused"], 2.5, ">=")


def _grouped_case(report: Report, r: int) -> tuple[float, float]:
    """Ratio to the single-adapter kernel, and speed over a loop."""
    rows = CLIENTS * TOKENS
    sets = sets_for(2 * rows * WIDTH * 2)
    a = randn(CLIENTS, WIDTH, r, scale=WIDTH**-0.5).requires_grad_()
    b = randn(CLIENTS, r, WIDTH, scale=r**-0.5).requires_grad_()
    one_a, one_b = a[0].detach().clone().requires_grad_(), b[0].detach().clone().requires_grad_()
    xs = [randn(rows, WIDTH).requires_grad_() for _ in range(sets)]
    grads = [randn(rows, WIDTH) for _ in range(sets)]
    offsets = torch.arange(0, rows + 1, TOKENS, device="cuda", dtype=torch.int32)
    many, single = [[x, a, b] for x in xs], [[x, one_a, one_b] for x in xs]

    def fused(x: Tensor, a: Tensor, b: Tensor, validate: bool = False) -> Tensor:
        y: Tensor = grouped_adapter(x, a, b, offsets, 1.0, "gelu", validate=validate)
        return y

    variants = {
        "single adapter": with_backward(lambda x, a, b: nano_adapter(x, a, b, 1.0, "gelu"), single, grads),
        "fused": with_backward(fused, many, grads),
        "fused, offsets checked": with_backward(lambda x, a, b: fused(x, a, b, True), many, grads),
        "loop": with_backward(
            lambda x, a, b: grouped_adapter_reference(x, a, b, offsets, 1.0, "gelu"), many, grads
        ),
    }
    found = (0.0, 0.0)
    for mode, graph in MODES.items():
        allowed = {
            name: v for name, v in variants.items() if not graph or name in ("single adapter", "fused")
        }
        ratios = report.row(
            "K3 grouped_adapter", f"{CLIENTS} clients x {TOKENS}, d={WIDTH} r={r}", "forward+backward", mode,
            measure(allowed, sets, graph=graph), base="single adapter",
        )  # fmt: skip
        found = (ratios["fused"], 0.0) if graph else (found[0], ratios["loop"] / ratios["fused"])
    return found


def grouped_cases(report: Report) -> None:
    """K3: many clients in one launch against one client of as many tokens, and against a loop over the clients."""
    found = {r: _grouped_case(report, r) for r in (16, 64)}
    report.gate("K3_grouped_over_single_adapter", found[16][0], 1.15, "<=")
    report.gate("K3_grouped_over_single_adapter_r64", found[64][0], 1.15, "<=")
    report.gate("K3_grouped_speedup_over_loop", min(f[1] for f in found.values()), 3.0, ">=")
