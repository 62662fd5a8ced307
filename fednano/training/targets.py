"""Which tokens are to be forgotten: those of the answer, without its end."""

from __future__ import annotations

import torch
from torch import Tensor

from fednano.models.language import IGNORE

__all__ = ["without_end"]


def without_end(labels: Tensor, end: int | None) -> Tensor:
    """Labels without the end token of each answer.

    A model that unlearns the end token does not forget: it forgets to stop.

    Args:
        labels: ``(B, T)`` int64, -100 where nothing is to be predicted.
        end: id of the end token, ``None`` where there is none.

    Returns:
        ``(B, T)``; a row whose only label is the end token stays as it is, since its loss must exist.
    """
    if end is None:
        return labels
    used = labels != IGNORE
    place = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(used, place, -1).max(dim=1).values  # (B,)
    ends = (place == last[:, None]) & (labels == end) & (used.sum(dim=1, keepdim=True) > 1)
    return labels.masked_fill(ends, IGNORE)
