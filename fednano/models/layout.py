"""Where the real tokens and the labelled ones of a batch lie, worked out beside the device.

A device that is asked for a number makes the program wait until it has done all work before that. So whatever can be
known from mask and labels alone is worked out here, on the CPU, once a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fednano.models.images import Images
from fednano.models.language_inputs import IGNORE

__all__ = ["Layout", "lay_out"]


@dataclass(frozen=True)
class Layout:
    """A batch of B samples of which the longest has L tokens, each moved to the left edge. All on the CPU.

    Attributes:
        longest: L.
        real: ``(B, L)`` bool, or ``None`` where every place is a real token.
        index: ``(B, L)`` the place in its old row that each new place takes, or ``None`` where rows begin at the left
            already.
        chosen: ``(N,)`` places, counted over all rows of L, of the hidden states that predict a label.
        targets: ``(N,)`` those labels.
        counts: labels of each sample.
        images: of each sample.
    """

    longest: int
    real: Tensor | None
    index: Tensor | None
    chosen: Tensor
    targets: Tensor
    counts: list[int]
    images: Images = ()

    def align(self, embeds: Tensor) -> Tensor:
        """Rows ``(B, T, d)`` on any device as ``(B, L, d)``, zeros as padding; differentiable."""
        if self.index is None:
            x = embeds[:, : self.longest]
        else:
            index = self.index.to(embeds.device, non_blocking=True)
            x = embeds.gather(1, index.unsqueeze(-1).expand(-1, -1, embeds.shape[2]))
        if self.real is None:
            return x
        return torch.where(self.real.to(embeds.device, non_blocking=True).unsqueeze(-1), x, 0)


def lay_out(mask: Tensor, labels: Tensor, images: Images = ()) -> Layout:
    """The layout of a batch.

    Args:
        mask: ``(B, T)`` bool, one run of true in each row.
        labels: ``(B, T)`` int64.
        images: of each sample.
    """
    mask, labels = mask.detach().cpu().bool(), labels.detach().cpu()
    lengths = mask.sum(1, keepdim=True)  # (B, 1)
    start = mask.int().argmax(1, keepdim=True)
    longest = int(lengths.max())
    place = torch.arange(longest).unsqueeze(0)
    real = place < lengths  # (B, L)
    index = torch.where(real, place + start, 0)
    y = labels.gather(1, index)
    keep = real & (y != IGNORE)
    keep[:, 0] = False  # nothing predicts a sample's first token
    rows, columns = keep.nonzero(as_tuple=True)
    return Layout(
        longest,
        None if bool(real.all()) else real,
        None if not bool(start.any()) else index,
        rows * longest + columns - 1,
        y[keep],
        keep.sum(1).tolist(),
        images,
    )
