"""Benchmark cases of K9: scatter_delta and the seeded basis."""

from __future__ import annotations

import torch
from fednano_kernels import (
    Support,
    scatter_delta,
    scatter_delta_reference,
    seeded_combine,
    seeded_combine_reference,
)
from torch import Tensor

from benchmarks.kernels_adapters import MODES, randn, with_backward
from benchmarks.kernels_report import Report
from benchmarks.kernels_timing import Variant, measure, peak_extra, sets_for

WIDTH, ENTRIES = 4096, 16 * (4096 + 4096)  # as many trained numbers as LoRA of rank 16
SCATTER_ROWS = (128, 512, 2048, 8192)
PLANES, FACTOR = 1024, (16, 4096)


def _scatter_case(report: Report, m: int) -> float:
    """Speed-up over the dense matrix, forward and backward."""
    sets = sets_for(2 * m * WIDTH * 2)
    support = Support.build(torch.randperm(WIDTH * WIDTH, device="cuda")[:ENTRIES], (WIDTH, WIDTH))
    values = randn(ENTRIES).requires_grad_()
    xs = [randn(m, WIDTH).requires_grad_() for _ in range(sets)]
    grads = [randn(m, WIDTH) for _ in range(sets)]
    inputs = [[x, values] for x in xs]
    torch._dynamo.reset()
    dense = torch.compile(lambda x, v: scatter_delta_reference(x, v, support), dynamic=False)
    variants: dict[str, Variant] = {
        "fused": with_backward(lambda x, v: scatter_delta(x, v, support), inputs, grads),
        "eager": with_backward(lambda x, v: scatter_delta_reference(x, v, support), inputs, grads),
        "compile": with_backward(dense, inputs, grads),
    }
    memory = {name: peak_extra(lambda run=run: run(0)) for name, run in variants.items()}  # type: ignore[misc]
    found = 0.0
    for mode, graph in MODES.items():
        times = measure(variants, sets, graph=graph, rounds=7)
        ratios = report.row(
            "K9 scatter_delta", f"M={m} {WIDTH}->{WIDTH} entries={ENTRIES}", "forward+backward", mode, times,
            base="fused", peak_extra_bytes=memory,
        )  # fmt: skip
        if graph:
            found = ratios["eager"]
    return found


def _seeded_case(report: Report) -> float:
    """Speed-up of NOLA's factor over drawing the same numbers in torch, forward and backward."""
    n = FACTOR[0] * FACTOR[1]
    key = torch.tensor(1234567, device="cuda")
    coefficients = torch.randn(PLANES, device="cuda").requires_grad_()
    grad = torch.randn(n, device="cuda")

    def native(c: Tensor) -> Tensor:
        # The quickest plain way on a GPU: torch's own generator, whose bits another device would not reproduce.
        planes = torch.rand(PLANES, n, device="cuda") * 2 - 1
        return c @ planes

    variants: dict[str, Variant] = {
        "fused": lambda _: torch.autograd.grad(
            seeded_combine(coefficients, key, n, 0.03), coefficients, grad
        ),
        "eager, torch.rand": lambda _: torch.autograd.grad(native(coefficients), coefficients, grad),
        "eager, same bits": lambda _: torch.autograd.grad(
            seeded_combine_reference(coefficients, key, n, 0.03), coefficients, grad
        ),
    }
    case = f"{PLANES} planes of {n}"
    times = measure({k: v for k, v in variants.items() if "bits" not in k}, 1, graph=True)
    ratios = report.row("K9 seeded_combine", case, "forward+backward", "graph", times, base="fused")
    times = measure(variants, 1, graph=False, rounds=5)
    report.row("K9 seeded_combine", case, "forward+backward", "eager", times, base="fused")
    return ratios["eager, torch.rand"]


def sparse_cases(report: Report) -> None:
    """K9: against the dense path that these adapters would otherwise take."""
    for m in SCATTER_ROWS:
        report.gate(f"K9_scatter_speedup_over_eager_M{m}", _scatter_case(report, m), 2.0, ">=")
    report.gate("K9_seeded_speedup_over_eager", _seeded_case(report), 2.0, ">=")
