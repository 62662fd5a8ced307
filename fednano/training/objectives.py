"""Token losses that may be asked of the frozen language model, by name.

Each takes logits ``(N, V)`` of N predicted tokens and their labels ``(N,)`` and returns each token's loss
``(N,)``. The arithmetic is float32 at least: logits of a narrower type are widened first, float64 stays
float64.

With ``p = softmax(z)``, the label ``t`` and the likeliest other token ``j``, the gradients in the logits
``z`` are

====================  =========================  ======================================
name                  loss                       gradient
====================  =========================  ======================================
``cross_entropy``     ``-log p_t``               ``p - e_t``
``gradient_ascent``   ``log p_t``                ``e_t - p``
``inverted_hinge``    ``1 + p_t - p_j``          ``(p_j - p_t) p + p_t e_t - p_j e_j``
====================  =========================  ======================================

The inverted hinge is the unlearning objective of LoKU (Cha et al., arXiv 2408.06621): bounded in ``[0, 2]``,
and its gradient fades once the label is forgotten, where that of gradient ascent stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from fednano.errors import ConfigError

__all__ = [
    "Objective",
    "cross_entropy",
    "get_objective",
    "gradient_ascent",
    "inverted_hinge",
    "objective_names",
]

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label.

    Args:
        logits: ``(N, V)``, any float type.
        labels: ``(N,)`` int64 in ``[0, V)``.

    Returns:
        ``(N,)`` float32 (float64 for float64 logits).
    """
    return F.cross_entropy(_widen(logits), labels, reduction="none")


def gradient_ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-likelihood of each label: minimising it raises the cross-entropy without bound.

    Args:
        logits: ``(N, V)``, any float type.
        labels: ``(N,)`` int64 in ``[0, V)``.

    Returns:
        ``(N,)`` float32 (float64 for float64 logits).
    """
    return -cross_entropy(logits, labels)


def inverted_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """Inverted hinge ``1 + p_t - max_{v != t} p_v`` (LoKU, arXiv 2408.06621), in ``[0, 2]``.

    Where several other tokens tie for the maximum, one of them takes the whole gradient.

    Args:
        logits: ``(N, V)`` with ``V >= 2``, any float type.
        labels: ``(N,)`` int64 in ``[0, V)``.

    Returns:
        ``(N,)`` float32 (float64 for float64 logits).

    Raises:
        ConfigError: the vocabulary has fewer than two tokens, so that there is no other token.
    """
    if logits.shape[-1] < 2:
        raise ConfigError(f"inverted_hinge needs a vocabulary of at least 2 tokens, got {logits.shape[-1]}")
    p = _widen(logits).softmax(-1)  # (N, V)
    index = labels.unsqueeze(-1)  # (N, 1)
    p_label = p.gather(-1, index).squeeze(-1)  # (N,)
    p_other = p.scatter(-1, index, -1.0).max(-1).values  # (N,); -1 lies below every probability
    return 1.0 + p_label - p_other


_OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "gradient_ascent": gradient_ascent,
    "inverted_hinge": inverted_hinge,
}


def objective_names() -> tuple[str, ...]:
    """Names that `get_objective` knows, sorted."""
    return tuple(sorted(_OBJECTIVES))


def get_objective(name: str) -> Objective:
    """Return the token loss called ``name``.

    Raises:
        ConfigError: there is no such objective; the message lists those there are.
    """
    try:
        return _OBJECTIVES[name]
    except KeyError:
        known = ", ".join(objective_names())
        raise ConfigError(f"unknown objective {name!r}: use one of {known}") from None
