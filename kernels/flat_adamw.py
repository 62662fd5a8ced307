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

from ._dispatch import FLOATS, KernelArgumentError, is_traced, require, runs_triton

_DTYPES = (*FLOATS, torch.float64)

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


def _run(
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


@torch.library.custom_op("fednano::flat_adamw_", mutates_args=("w", "m", "v", "fisher"))
def _op(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, fisher: Tensor | None,
    step_on_device: Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, mu: float, fisher_weight: float,
) -> None:  # fmt: skip
    _run(
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


@_op.register_fake
def _(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, fisher: Tensor | None,
    step_on_device: Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, mu: float, fisher_weight: float,
) -> None:  # fmt: skip
    return None


def _dtypes_fit(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, fisher: Tensor | None
) -> bool:
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    return (
        w.dtype in _DTYPES
        and g.dtype in _DTYPES
        and m.dtype == v.dtype == wide
        and (anchor is None or anchor.dtype == w.dtype)
        and (fisher is None or fisher.dtype == wide)
    )


def _explain(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, anchor: Tensor | None, fisher: Tensor | None
) -> None:
    """Raise the error that names the argument at fault."""
    require(w.dim() == 1 and w.numel() >= 1, f"w has shape {tuple(w.shape)}; expected (n,) with n >= 1")
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    for name, tensor, dtypes in (
        ("w", w, _DTYPES),
        ("g", g, _DTYPES),
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
    given = [t for t in (g, m, v, anchor, fisher) if t is not None]
    alike = w.dim() == 1 and all(
        t.shape == w.shape and t.device == w.device and t.is_contiguous() for t in given
    )
    if not alike or w.numel() < 1 or not w.is_contiguous() or not _dtypes_fit(w, g, m, v, anchor, fisher):
        _explain(w, g, m, v, anchor, fisher)
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise KernelArgumentError(f"betas are {betas}; expected two numbers in [0, 1)")
    if not (
        0 <= lr < math.inf and 0 <= eps < math.inf and 0 <= weight_decay < math.inf and 0 <= mu < math.inf
    ):
        raise KernelArgumentError(
            f"lr is {lr}, eps {eps}, weight_decay {weight_decay}, mu {mu}; expected finite numbers >= 0"
        )
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
    arguments = (
        w.detach(), g, m, v, anchor, fisher, on_device, 0 if isinstance(step, Tensor) else step,
        float(lr), betas[0], betas[1], float(eps), float(weight_decay), float(mu), float(fisher_weight),
    )  # fmt: skip
    if is_traced(w):
        _op(*arguments)
        return
    _run(*arguments)
    # What autograd saved before this step must not be used after it: count the write, as torch's own operators do.
    for changed in (w, m, v, fisher):
        if changed is not None:
            torch.autograd.graph.increment_version(changed)
