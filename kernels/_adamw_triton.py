# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The elementwise kernel of ``flat_adamw_``."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from . import _tuning
from ._dispatch import cdiv
from ._launch import Plan, plan
from ._triton_common import narrow, precision


@triton.jit
def _kernel(
    w,  # (n,), changed
    g,  # (n,)
    m,  # (n,) float32, changed
    v,  # (n,) float32, changed
    anchor,  # (n,)
    fisher,  # (n,) float32, changed
    step,  # (1,) int64
    n,
    lr,
    keep1,  # beta1
    take1,  # 1 - beta1, rounded once
    keep2,
    take2,
    eps,
    decay,  # 1 - lr * weight_decay
    mu,
    fisher_weight,
    correct1,  # 1 - beta1^t
    root2,  # sqrt(1 - beta2^t)
    log1,
    log2,
    STEP_ON_DEVICE: tl.constexpr,
    PROXIMAL: tl.constexpr,
    FISHER: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    weight = tl.load(w + at, mask=inside).to(tl.float32)
    grad = tl.load(g + at, mask=inside).to(tl.float32)
    first = tl.load(m + at, mask=inside)
    second = tl.load(v + at, mask=inside)
    if STEP_ON_DEVICE:
        # In float64: one minus a number near one.
        t = tl.load(step).to(tl.float64)
        correct1 = (1.0 - tl.exp(t * log1)).to(tl.float32)
        root2 = tl.sqrt((1.0 - tl.exp(t * log2)).to(tl.float32))
    if FISHER:
        tl.store(fisher + at, tl.load(fisher + at, mask=inside) + fisher_weight * grad * grad, mask=inside)
    if PROXIMAL:
        grad += mu * (weight - tl.load(anchor + at, mask=inside).to(tl.float32))
    weight *= decay
    first = keep1 * first + take1 * grad
    second = keep2 * second + take2 * grad * grad
    weight -= lr / correct1 * first / (tl.sqrt_rn(second) / root2 + eps)
    tl.store(w + at, narrow(weight, w.dtype.element_ty, PRECISION), mask=inside)
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)


def launch(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, fisher: Tensor | None,
    step_on_device: Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, mu: float, fisher_weight: float,
) -> None:  # fmt: skip
    """One step; arguments as in ``flat_adamw_``. The host's numbers are formed in float64."""
    n = w.numel()

    def build() -> Plan:
        name = f"n{_tuning.bucket(n)}_{w.element_size()}"
        config = _tuning.choose("flat_adamw", w.device, name, {"BLOCK": 1024, "num_warps": 4})
        constants = {
            "STEP_ON_DEVICE": step_on_device is not None, "PROXIMAL": anchor is not None, "FISHER": fisher is not None,
            "BLOCK": config["BLOCK"], "PRECISION": precision(w),
        }  # fmt: skip
        return Plan(_kernel, (cdiv(n, config["BLOCK"]),), (n,), constants, config["num_warps"])

    key = ("adamw", n, step_on_device is None, anchor is None, fisher is None, w.dtype, g.dtype, w.device)
    plan(key, build)(
        (
            w, g, m, v, w if anchor is None else anchor, m if fisher is None else fisher,
            m if step_on_device is None else step_on_device,
        ),
        (
            lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, mu, fisher_weight,
            1 - beta1 ** max(step, 1), math.sqrt(1 - beta2 ** max(step, 1)),
            math.log(beta1) if beta1 else -math.inf, math.log(beta2) if beta2 else -math.inf,
        ),
    )  # fmt: skip
