"""Benchmark cases of the adapter kernels: K1 nano_adapter, K5 adapter_grad_fisher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from fednano_kernels import (
    adapter_grad_fisher,
    adapter_grad_fisher_reference,
    nano_adapter,
    nano_adapter_reference,
)
from torch import Tensor

from benchmarks.kernels_report import Report
from benchmarks.kernels_timing import Variant, measure, sets_for

BF16 = torch.bfloat16
NANO_SHAPES = [(8192, 4096, 16), (8192, 4096, 64), (32768, 1024, 16), (32768, 1024, 64), (65536, 4096, 64)]
FISHER_SHAPES = [(16, 700, 4096, 16), (16, 700, 4096, 64), (16, 700, 1024, 64), (16, 48, 4096, 64)]
MODES = {"graph": True, "eager": False}


def _reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y: Tensor = nano_adapter_reference(x, a, b, 1.0, "gelu")
    return y


def _on(f: Callable[..., Tensor], xs: list[Tensor], a: Tensor, b: Tensor, i: int) -> Tensor:
    """One call of ``f`` on the ``i``-th input; bound early, since loop variables change under a lambda."""
    return f(xs[i], a, b)


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    """Random values on the device: zeros would run faster than data does."""
    drawn: Tensor = torch.randn(*shape, device="cuda") * scale
    return drawn.to(dtype)


def with_backward(
    function: Callable[..., Tensor], inputs: list[list[Tensor]], grads: list[Tensor]
) -> Variant:
    """Forward and backward of ``function`` on input set i."""

    def run(i: int) -> Any:
        return torch.autograd.grad(function(*inputs[i]), [t for t in inputs[i] if t.requires_grad], grads[i])

    return run


def _nano_case(report: Report, m: int, d: int, r: int) -> dict[str, float]:
    """Rows of one shape; the numbers that gates are made of."""
    name, case, passes = "K1 nano_adapter", f"M={m} d={d} r={r} gelu", m * d * 2
    sets = sets_for(3 * passes)
    a, b = randn(d, r, scale=d**-0.5).requires_grad_(), randn(r, d, scale=r**-0.5).requires_grad_()
    xs, grads = [randn(m, d) for _ in range(sets)], [randn(m, d) for _ in range(sets)]
    trained = [[x.detach().requires_grad_(), a, b] for x in xs]
    torch._dynamo.reset()
    functions: dict[str, Callable[..., Tensor]] = {
        "fused": lambda x, a, b: nano_adapter(x, a, b, 1.0, "gelu"),
        "eager": lambda x, a, b: nano_adapter_reference(x, a, b, 1.0, "gelu"),
        "compile": torch.compile(_reference, dynamic=False),
    }
    found = {}
    for mode, graph in MODES.items():
        with torch.no_grad():
            forward: dict[str, Variant] = {n: partial(_on, f, xs, a, b) for n, f in functions.items()}
            times = measure(forward, sets, graph=graph)
        floor = report.floor_ms(2 * passes)
        one = report.row(name, case, "forward", mode, times, base="floor", base_ms=floor)
        times = measure(
            {n: with_backward(f, trained, grads) for n, f in functions.items()}, sets, graph=graph
        )
        floor = report.floor_ms(5 * passes)
        both = report.row(name, case, "forward+backward", mode, times, base="floor", base_ms=floor)
        if graph:
            found = {
                "forward": one["fused"],
                "both": both["fused"],
                "compile": both["compile"] / both["fused"],
            }
    return found


def nano_cases(report: Report) -> None:
    """K1: forward against two passes over x, forward+backward against five; every gate is its worst shape."""
    found = {shape: _nano_case(report, *shape) for shape in NANO_SHAPES}
    thin = [f["forward"] for (_, _, r), f in found.items() if r <= 32]
    wide = [f["forward"] for (_, _, r), f in found.items() if r == 64]
    report.gate("K1_nano_forward_over_floor_r_le_32", max(thin), 1.25, "<=")
    report.gate("K1_nano_forward_over_floor_r64", max(wide), 1.6, "<=")
    report.gate("K1_nano_forward_backward_over_floor", max(f["both"] for f in found.values()), 1.9, "<=")
    speed = min(f["compile"] for f in found.values())
    report.gate("K1_nano_forward_backward_speedup_over_compile", speed, 2.0, ">=")


def _fisher_case(report: Report, n: int, t: int, p: int, q: int) -> tuple[float, float]:
    """Ratio to the plain gradient, and speed-up over the einsum."""
    from fednano_kernels import _weight_grad_triton as wg

    moved = n * t * (p + q) * 2
    sets = sets_for(moved)
    xs, gs = [randn(n, t, p) for _ in range(sets)], [randn(n, t, q) for _ in range(sets)]
    out = torch.empty(p, q, device="cuda")
    variants: dict[str, Variant] = {
        "fused": lambda i: adapter_grad_fisher(xs[i], gs[i]),
        "plain gradient": lambda i: wg.gradients(wg.Product(xs[i].flatten(0, 1), gs[i].flatten(0, 1), out)),
        "cuBLAS gradient": lambda i: xs[i].flatten(0, 1).T @ gs[i].flatten(0, 1),
        "einsum": lambda i: adapter_grad_fisher_reference(xs[i], gs[i]),
    }
    found = (0.0, 0.0)
    for mode, graph in MODES.items():
        times = measure(variants, sets, graph=graph)
        ratios = report.row(
            "K5 adapter_grad_fisher", f"N={n} T={t} p={p} q={q}", "gradient+Fisher", mode, times,
            base="plain gradient", floor_ms=report.floor_ms(moved),
        )  # fmt: skip
        if graph:
            found = (ratios["fused"], ratios["einsum"] / ratios["fused"])
    return found


def fisher_cases(report: Report) -> None:
    """K5: against the plain weight gradient, and against an einsum that holds all per-sample gradients."""
    found = {shape: _fisher_case(report, *shape) for shape in FISHER_SHAPES}
    long = [f for (_, t, _, _), f in found.items() if t == 700]
    report.gate("K5_fisher_over_plain_gradient", max(f[0] for f in long), 1.15, "<=")
    report.gate("K5_fisher_speedup_over_einsum", min(f[1] for f in long), 5.0, ">=")
    report.gate("K5_fisher_speedup_over_einsum_T48", found[16, 48, 4096, 64][1], 5.0, ">=")
