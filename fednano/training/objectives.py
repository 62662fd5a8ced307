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

Baselines of unlearning need more than logits and labels, so they are functions and have no name at a host:
`npo`, `simnpo` and `dpo` take each answer's negative log-likelihood ``l`` (its sum over tokens) and that of a
reference model ``l_ref``, computed before. A host's ``cross_entropy`` times the number of tokens is ``l``, and
its gradient flows, so they work through a host. `kl_divergence` needs whole distributions, which a host does
not give. With ``s`` the logistic function and the gap ``u = l - l_ref``:

==================  =============================================  =====================================
name                loss                                           gradient
==================  =============================================  =====================================
``npo``             ``-2/b log s(b u)``                            ``-2 s(-b u)`` in ``l``
``simnpo``          ``-2/b log s(b (l/T - delta))``                ``-2/T s(-b (l/T - delta))`` in ``l``
``dpo``             ``-2/b log s(b (u_rejected - u_preferred))``   ``-2 s(-b (...))`` in ``l_rejected``
``kl_divergence``   ``sum_v q_v (log q_v - log p_v)``              ``p - q`` in the logits
==================  =============================================  =====================================
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
    "dpo",
    "get_objective",
    "gradient_ascent",
    "inverted_hinge",
    "kl_divergence",
    "npo",
    "objective_names",
    "simnpo",
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


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """``KL(q || p)`` from the reference model's distribution ``q`` to the model's ``p``, at each token.

    Args:
        logits: ``(N, V)`` of the model, any float type.
        reference: ``(N, V)`` of the reference model; takes no gradient.

    Returns:
        ``(N,)`` float32 (float64 for float64 logits), in nats.
    """
    log_p, log_q = _widen(logits).log_softmax(-1), _widen(reference.detach()).log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def npo(nll: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """Negative preference optimisation (Zhang et al., arXiv 2404.05868): gradient ascent that ends by itself.

    Args:
        nll: ``(B,)`` negative log-likelihood of each answer to forget, summed over its tokens.
        reference: ``(B,)`` the same under the model before unlearning.
        beta: inverse temperature; towards 0 it becomes gradient ascent.

    Returns:
        ``(B,)``, 0 where the answer is forgotten.

    Raises:
        ConfigError: ``beta`` is not positive.
    """
    return -2 / _positive(beta) * F.logsigmoid(beta * (nll - reference.detach()))


def simnpo(nll: Tensor, tokens: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """SimNPO (Fan et al., arXiv 2410.07163): NPO without a reference, on the mean over tokens.

    Args:
        nll: ``(B,)`` negative log-likelihood of each answer to forget, summed over its tokens.
        tokens: ``(B,)`` their numbers, at least 1.
        beta: inverse temperature.
        delta: margin in nats a token.

    Returns:
        ``(B,)``.

    Raises:
        ConfigError: ``beta`` is not positive.
    """
    return -2 / _positive(beta) * F.logsigmoid(beta * (nll / tokens - delta))


def dpo(
    preferred: Tensor,
    preferred_reference: Tensor,
    rejected: Tensor,
    rejected_reference: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) of a refusal over the answer to forget.

    The factor ``2/b`` before the loss is TOFU's; it makes the gradient at the start that of gradient ascent.

    Args:
        preferred: ``(B,)`` negative log-likelihood of "I do not know", summed over its tokens.
        preferred_reference: ``(B,)`` the same under the model before unlearning.
        rejected: ``(B,)`` negative log-likelihood of the answer to forget.
        rejected_reference: ``(B,)`` the same under the model before unlearning.
        beta: inverse temperature.

    Returns:
        ``(B,)``.

    Raises:
        ConfigError: ``beta`` is not positive.
    """
    gap = (rejected - rejected_reference.detach()) - (preferred - preferred_reference.detach())
    return -2 / _positive(beta) * F.logsigmoid(beta * gap)


def _positive(beta: float) -> float:
    if not beta > 0:
        raise ConfigError(f"beta is {beta}; expected a positive number such as 0.1")
    return beta


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
