"""A batch as a frozen part and low-rank parts: what a step needs when the host keeps the frozen part.

Behind a frozen encoder the raw embeddings ``h`` of a sample never change. An adapter adds ``z U`` to the rows of its
stream, with ``z = act(h A)`` of r columns and ``U`` its scaled up-projection. So a step is ``h + z U`` on the host, and
with ``g`` the gradient of the loss there, all that the client's adapters need is ``g U^T`` (for z, hence for A) and
``z^T g`` (for U). Both are exact. For a batch of N tokens the wire carries ``2 r (N + d)`` numbers instead of
``2 N d``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fednano.models.images import Images

__all__ = ["FactoredBatch", "FactoredCompute", "FactoredModel", "StreamFactors", "factored_loss"]


@dataclass(frozen=True)
class StreamFactors:
    """What one adapter adds.

    Attributes:
        where: ``(B, T)`` bool: its N positions.
        z: ``(N, r)``, rows in the order of ``where``.
        up: ``(r, d)``, the adapter's scale included.
    """

    where: Tensor
    z: Tensor
    up: Tensor


@dataclass(frozen=True)
class FactoredBatch:
    """A batch of B samples padded to T tokens.

    Attributes:
        raw: ``(B, T, d)`` embeddings before the adapters, without a graph.
        mask: ``(B, T)`` bool, true at real tokens, which start each row.
        labels: ``(B, T)`` int64.
        streams: the adapters' parts; their positions do not overlap.
        images: of each sample.
        names: for each sample something that is equal only for equal frozen parts; empty if nobody knows.
    """

    raw: Tensor
    mask: Tensor
    labels: Tensor
    streams: tuple[StreamFactors, ...]
    images: Images = ()
    names: tuple[Hashable, ...] = ()

    def stream_ids(self) -> Tensor:
        """``(B, T)`` uint8: 1 + the index of the stream that a position belongs to, 0 for none."""
        ids = torch.zeros(self.mask.shape, dtype=torch.uint8, device=self.mask.device)
        for index, stream in enumerate(self.streams):
            ids[stream.where] = index + 1
        return ids

    def embeds(self) -> Tensor:
        """``(B, T, d)`` the adapted embeddings, whole, in the type of ``raw``."""
        whole = self.raw
        for stream in self.streams:
            # Adapters may compute in a wider type than the frozen parts have.
            rows = (whole[stream.where] + stream.z @ stream.up).to(whole.dtype)
            whole = whole.masked_scatter(stream.where.unsqueeze(-1), rows)
        return whole


@runtime_checkable
class FactoredModel(Protocol):
    """A language model that can keep frozen parts."""

    @property
    def wants_factored(self) -> bool:
        """Whether its user chose this exchange."""
        ...

    def factored_loss(self, batch: FactoredBatch, objective: str = "cross_entropy") -> Tensor:
        """Losses ``(B,)`` of the batch's adapted embeddings, differentiable once in the streams' z and up."""
        ...


FactoredCompute: TypeAlias = Callable[
    [list[Tensor], list[Tensor], Tensor | None, bool], tuple[Tensor, list[Tensor], list[Tensor]]
]
"""Maps z and up of each stream, weights ``(B,)`` of the samples (``None``: all one) and whether gradients are wanted to
losses ``(B,)`` and the gradients of the weighted sum in each z and up."""


def factored_loss(batch: FactoredBatch, compute: FactoredCompute) -> Tensor:
    """Losses ``(B,)``, differentiable once in the streams' z and up.

    Gradients are asked for together with the losses, for equal weights; should the caller then weigh the samples
    unequally, they are asked for once more. A step has no side effect, so that costs time and nothing else.

    Args:
        batch: see `FactoredBatch`.
        compute: asks the host.
    """
    parts = [part for stream in batch.streams for part in (stream.z, stream.up)]
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        losses: Tensor = _FactoredLoss.apply(compute, *parts)  # type: ignore[no-untyped-call]
        return losses
    z, up = [part.detach() for part in parts[::2]], [part.detach() for part in parts[1::2]]
    return compute(z, up, None, False)[0].to(batch.raw.device)


class _FactoredLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: FactoredCompute, *parts: Tensor) -> Tensor:
        z, up = [part.detach() for part in parts[::2]], [part.detach() for part in parts[1::2]]
        losses, z_gradients, up_gradients = compute(z, up, None, True)
        ctx.compute, ctx.count = compute, len(z)
        ctx.save_for_backward(*z, *up, *z_gradients, *up_gradients)
        return losses.to(parts[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Any, ...]:
        n = ctx.count
        saved = ctx.saved_tensors
        z, up, z_gradients, up_gradients = (list(saved[i * n : (i + 1) * n]) for i in range(4))
        common = weights[0]
        if not bool((weights == common).all()):
            _, z_gradients, up_gradients = ctx.compute(z, up, weights.detach(), True)
            common = torch.ones_like(common)
        found: list[Tensor | None] = [None]
        for index in range(n):
            for like, gradient in ((z[index], z_gradients[index]), (up[index], up_gradients[index])):
                found.append(gradient.to(like) * common.to(like))
        return tuple(found)
