"""AdamW (arXiv 1711.05101) on one flat buffer, with a proximal pull and a Fisher accumulator in the same pass.

A step reads and writes each buffer once, whatever is switched on::

    F  ← F + f·g²                                 (f = fisher_weight, the gradient as it came)
    g' = g + μ (w − w0)                           (FedProx, arXiv 1812.06127)
    w  ← (1 − lr·λ) w
    m  ← β1 m + (1 − β1) g'      v ← β2 v + (1 − β2) g'²
    w  ← w − lr · (m / (1 − β1^t)) / (√(v / (1 − β2^t)) + ε)

F accumulates squares of the gradient it is given. That is the empirical Fisher only if the gradient is of one sample:
the square of a batch's mean is not the mean of the squares. ``adapter_grad_fisher`` gives the exact per-sample one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dispatch import FLOATS, require, runs_triton

__all__ = ["flat_adamw_", "flat_adamw_reference_"]


def flat_adamw_reference_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int | Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    anchor: Tensor | None = None,
    mu: float = 0.0,
    fisher: Tensor | None = None,
    fisher_weight: float = 1.0,
) -> None:
    """The same in plain torch; arguments as in ``flat_adamw_``."""
    wide = m.dtype
    t = int(step)
    gradient = g.to(wide)
    weights = w.to(wide)
    if fisher is not None:
        fisher.addcmul_(gradient, gradient, value=fisher_weight)
    if anchor is not None:
        gradient = gradient + mu * (weights - anchor.to(wide))
    weights = weights * (1 - lr * weight_decay)
    m.lerp_(gradient, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = (v.sqrt() / math.sqrt(1 - betas[1] ** t)).add_(eps)
    w.copy_(weights.addcdiv(m, denominator, value=-lr / (1 - betas[0] ** t)))


@torch.library.custom_op("fednano::flat_adamw_", mutates_args=("w", "m", "v", "fisher"))
def _op(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, fisher: Tensor | None,
    step_on_device: Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, mu: float, fisher_weight: float,
) -> None:  # fmt: skip
    if runs_triton(w):
        from . import _adamw_triton

        _adamw_triton.launch(
            w,
            g,
            m,
            v,
            anchor,
            fisher,
            step_on_device,
            step,
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            mu,
            fisher_weight,
        )
        return
    flat_adamw_reference_(
        w, g, m, v, step if step_on_device is None else step_on_device, lr=lr, betas=(beta1, beta2), eps=eps,
        weight_decay=weight_decay, anchor=anchor, mu=mu, fisher=fisher, fisher_weight=fisher_weight,
    )  # fmt: skip


@_op.register_fake
def _(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, fisher: Tensor | None,
    step_on_device: Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, mu: float, fisher_weight: float,
) -> None:  # fmt: skip
    return None


def flat_adamw_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    step: int | Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    anchor: Tensor | None = None,
    mu: float = 0.0,
    fisher: Tensor | None = None,
    fisher_weight: float = 1.0,
) -> None:
    """One AdamW step in place, as ``torch.optim.AdamW`` does it, in one kernel.

    Args:
        w: ``(n,)`` contiguous parameters, float32, bfloat16 or float16; changed.
        g: ``(n,)`` gradient, any of these dtypes.
        m: ``(n,)`` float32 first moment; changed.
        v: ``(n,)`` float32 second moment; changed.
        step: which step this is, from 1; an int, or an int64 tensor of one element on the device (so that a captured
            CUDA graph can count).
        lr: learning rate.
        betas: decay of the moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: λ, decoupled.
        anchor: ``(n,)`` w0 of the proximal term, dtype of w; None switches it off.
        mu: strength of the pull to the anchor; needs an anchor.
        fisher: ``(n,)`` float32 accumulator; changed; None switches it off.
        fisher_weight: f, the weight of this step's squares.

    Raises:
        KernelArgumentError: a shape, dtype, device or number does not fit.
    """
    require(w.dim() == 1 and w.numel() >= 1, f"w has shape {tuple(w.shape)}; expected (n,) with n >= 1")
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    for name, tensor, dtypes in (
        ("w", w, (*FLOATS, torch.float64)),
        ("g", g, (*FLOATS, torch.float64)),
        ("m", m, (wide,)),
        ("v", v, (wide,)),
        ("anchor", anchor, (w.dtype,)),
        ("fisher", fisher, (wide,)),
    ):
        if tensor is None:
            continue
        require(
            tensor.shape == w.shape,
            f"{name} has shape {tuple(tensor.shape)}; expected {tuple(w.shape)}, as w",
        )
        require(tensor.device == w.device, f"{name} is on {tensor.device}; expected {w.device}, as w")
        require(tensor.dtype in dtypes, f"{name} is {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
        require(tensor.is_contiguous(), f"{name} is not contiguous; a flat buffer must be")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        require(0 <= beta < 1, f"{name} is {beta}; expected a number in [0, 1)")
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("mu", mu)):
        require(number >= 0 and math.isfinite(number), f"{name} is {number}; expected a finite number >= 0")
    require(mu == 0 or anchor is not None, f"mu is {mu} but there is no anchor to pull to; give anchor=w0")
    on_device = None
    if isinstance(step, Tensor):
        require(
            step.dtype == torch.int64 and step.numel() == 1 and step.device == w.device,
            f"step is {step.dtype} {tuple(step.shape)} on {step.device}; expected int64 of one element on {w.device}",
        )
        on_device = step
    else:
        require(step >= 1, f"step is {step}; steps count from 1")
    numbers = (
        float(lr),
        betas[0],
        betas[1],
        float(eps),
        float(weight_decay),
        float(mu),
        float(fisher_weight),
    )
    _op(w.detach(), g, m, v, anchor, fisher, on_device, 0 if isinstance(step, Tensor) else step, *numbers)
