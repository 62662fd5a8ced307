"""Benchmark cases of the loss and the optimiser: K4 linear_token_loss, K6 flat_adamw."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from fednano_kernels import flat_adamw_, linear_token_loss
from fednano_kernels.linear_token_loss import _loss_of_logits
from torch import Tensor

from benchmarks.kernels_adapters import MODES, randn
from benchmarks.kernels_report import Report
from benchmarks.kernels_timing import Variant, measure, peak_extra

LOSS_SHAPES = [(4096, 4096, 32000), (4096, 2048, 128256)]
SHORT = {"inverted_hinge": "ihl", "cross_entropy": "ce"}


def _dense(objective: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The plain torch loss without the selection of labelled rows, so that it can be compiled and captured."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows: Tensor = _loss_of_logits((hidden @ weight.T).float(), labels, objective, None, 0.1)
        return rows

    return loss


def _liger(weight: Tensor, labels: Tensor, hs: list[Tensor]) -> Variant | None:
    """Liger's fused linear cross-entropy over the same frozen head, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        print("  Liger is not installed; left out")
        return None
    try:
        module = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
            reduction="mean"
        )
    except Exception as error:
        print(f"  Liger cannot be used: {type(error).__name__}: {str(error)[:200]}")
        return None
    return lambda i: torch.autograd.grad(module(weight, hs[i], labels), hs[i])


def _loss_case(report: Report, m: int, d: int, v: int, objective: str) -> None:
    name, case, what = "K4 linear_token_loss", f"M={m} d={d} V={v} {objective}", "forward+backward"
    weight = randn(v, d, scale=d**-0.5)
    hs = [randn(m, d).requires_grad_() for _ in range(2)]
    labels = torch.randint(0, v, (m,), device="cuda")
    ones = torch.ones(m, device="cuda") / m
    torch._dynamo.reset()
    dense = _dense(objective)
    compiled = torch.compile(_dense(objective), dynamic=False)
    buffers: dict[str, Tensor] = {}

    def gemms(i: int) -> None:
        torch.mm(hs[i].detach(), weight.T, out=buffers["logits"])
        torch.mm(buffers["logits"], weight, out=buffers["target"])

    def fused(i: int, rows: int | None = m, which: Tensor = labels) -> Any:
        loss = linear_token_loss(hs[i], weight, which, objective, labelled_rows=rows)
        return torch.autograd.grad(loss, hs[i], ones)

    def plain(i: int, function: Callable[..., Tensor] = dense) -> Any:
        return torch.autograd.grad(function(hs[i], weight, labels), hs[i], ones)

    memory = {"fused": peak_extra(lambda: fused(0)), "eager": peak_extra(lambda: plain(0))}
    buffers = {"logits": randn(m, v), "target": randn(m, d)}
    variants: dict[str, Variant] = {
        "two GEMMs": gemms,
        "fused": fused,
        "eager": plain,
        "compile": lambda i: plain(i, compiled),
    }
    ratios = {}
    for mode, graph in MODES.items():
        if objective == "cross_entropy" and not graph and (peer := _liger(weight, labels, hs)) is not None:
            variants["Liger"] = peer
        times = measure(variants, len(hs), graph=graph, rounds=7)
        ratios = report.row(name, case, what, mode, times, base="two GEMMs", peak_extra_bytes=memory)
    short = SHORT[objective]
    report.gate(f"K4_loss_{short}_V{v}_over_two_gemms", ratios["fused"], 1.20, "<=")
    report.gate(
        f"K4_loss_{short}_V{v}_peak_memory_over_eager", memory["fused"] / memory["eager"], 1 / 8, "<="
    )
    if objective == "inverted_hinge":
        third = torch.where(torch.rand(m, device="cuda") < 2 / 3, -100, labels)
        count = int((third != -100).sum())
        some: dict[str, Variant] = {
            "all rows labelled": fused,
            "a third, count given": lambda i: fused(i, count, third),
            "a third, counted": lambda i: fused(i, None, third),
        }
        times = measure(some, len(hs), graph=False, rounds=5)
        report.row(name, case, what, "eager", times, base="all rows labelled")


def loss_cases(report: Report) -> None:
    """K4: against two cuBLAS products of the same shapes; memory against eager."""
    for m, d, v in LOSS_SHAPES:
        for objective in SHORT:
            _loss_case(report, m, d, v, objective)


def _adamw_case(report: Report, n: int) -> tuple[float, float]:
    """Speed over torch's fused AdamW with everything off, and ratio to its time with everything on."""
    w, m, v, fisher = (torch.rand(n, device="cuda") for _ in range(4))
    g, anchor = torch.randn(n, device="cuda"), w.clone()
    twin = torch.nn.Parameter(w.clone())
    twin.grad = g.clone()
    # Capturable: the step counter is on the device, so that it runs in a graph as ours does.
    theirs = torch.optim.AdamW([twin], lr=1e-4, weight_decay=0.01, fused=True, capturable=True)
    step = torch.tensor([10], device="cuda")
    both: dict[str, Any] = {"fisher": fisher, "anchor": anchor, "mu": 0.1}

    def ours(**more: Any) -> Variant:
        return lambda _: flat_adamw_(w, g, m, v, step, lr=1e-4, weight_decay=0.01, **more)

    variants = {
        "torch fused": lambda _: theirs.step(),
        "ours": ours(),
        "ours, Fisher": ours(fisher=fisher),
        "ours, Fisher + proximal": ours(**both),
    }
    found = (0.0, 0.0)
    for mode, graph in MODES.items():
        times = measure(variants, 1, graph=graph)
        ratios = report.row(
            "K6 flat_adamw",
            f"n={n} float32",
            "step",
            mode,
            times,
            base="torch fused",
            floor_ms=report.floor_ms(28 * n),
        )
        if graph:
            found = (1 / ratios["ours"], ratios["ours, Fisher + proximal"])
    return found


def adamw_cases(report: Report) -> None:
    """K6: one flat buffer against torch's fused AdamW on the same buffer."""
    found = [_adamw_case(report, n) for n in (1 << 20, 1 << 24, 1 << 26)]
    report.gate("K6_adamw_speed_over_torch_fused", min(f[0] for f in found), 1.0, ">=")
    report.gate("K6_adamw_fisher_proximal_over_torch_fused", max(f[1] for f in found), 1.3, "<=")
