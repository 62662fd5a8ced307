"""One step of split training as an autograd node: losses forward, and their gradient in the same moment.

A language host answers a step once, so it must send the gradient together with the losses, before it can know
how the caller will weigh the samples. Samples never interact, so that is no loss: row i of the gradient of a
weighted sum is row i of the gradient of the plain sum, times the weight. A model in this process computes in
the same order, which makes the two give the same bits and not only the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["StepCompute", "step_loss"]

StepCompute: TypeAlias = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
"""Maps embeddings ``(B, T, d)`` to losses ``(B,)`` and, if asked, the gradient ``(B, T, d)`` of their sum."""


def step_loss(embeds: Tensor, compute: StepCompute) -> Tensor:
    """Losses of a batch, differentiable once in its embeddings.

    Args:
        embeds: ``(B, T, d)`` float.
        compute: called once, now, with detached embeddings; asked for a gradient only if one can be needed.

    Returns:
        ``(B,)`` on the device of ``embeds``.
    """
    if torch.is_grad_enabled() and embeds.requires_grad:
        losses: Tensor = _StepLoss.apply(embeds, compute)  # type: ignore[no-untyped-call]
        return losses
    return compute(embeds.detach(), False)[0].to(embeds.device)


class _StepLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeds: Tensor, compute: StepCompute) -> Tensor:
        losses, gradient = compute(embeds.detach(), True)
        assert gradient is not None
        ctx.save_for_backward(gradient.to(embeds.device, embeds.dtype))
        return losses.to(embeds.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors  # (B, T, d)
        return gradient * weights.to(gradient.dtype)[:, None, None], None
