"""The relative Fisher: how much more the forget set depends on a row of a weight than the retained data does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from fednano.errors import ConfigError, DataError

__all__ = ["FLOOR", "SPREAD", "row_weights", "row_weights_from_sums", "weight_fisher"]

FLOOR = 1e-3
"""``eps`` as a share of the mean retained Fisher."""
SPREAD = 1e2
"""Row weights stay within this factor of their mean, on both sides."""


def row_weights(forget: Tensor, retain: Tensor, *, floor: float = FLOOR, spread: float = SPREAD) -> Tensor:
    """Weights ``d`` of the rows, with mean square 1 before they are kept within ``spread``.

    Args:
        forget: ``(d_out, d_in)`` diagonal Fisher of the forget set, not negative.
        retain: ``(d_out, d_in)`` of retained data, from the same party.
        floor: see `FLOOR`.
        spread: see `SPREAD`.

    Returns:
        ``(d_out,)`` float64. All ones where the forget set's Fisher is zero: nothing tells the rows apart.

    Raises:
        DataError: the shapes differ, or a number is negative or not finite.
        ConfigError: ``floor`` is negative or ``spread`` below 1.
    """
    forget, retain = _checked(forget, retain, floor, spread)
    return _weights((forget / _floored(retain, floor)).sum(dim=1), spread)


def row_weights_from_sums(
    forget: Tensor, retain: Tensor, *, floor: float = FLOOR, spread: float = SPREAD
) -> Tensor:
    """Approximate `row_weights` where parties exchange row sums only: the ratio of sums, not the sum of ratios.

    Args:
        forget: ``(d_out,)`` row sums of the forget set's Fisher.
        retain: ``(d_out,)`` of the retained data's, which may be another party's.
        floor: see `FLOOR`.
        spread: see `SPREAD`.

    Returns:
        ``(d_out,)`` float64.

    Raises:
        DataError: see `row_weights`.
    """
    forget, retain = _checked(forget, retain, floor, spread)
    return _weights(forget / _floored(retain, floor), spread)


def _checked(forget: Tensor, retain: Tensor, floor: float, spread: float) -> tuple[Tensor, Tensor]:
    if floor < 0 or spread < 1:
        raise ConfigError(f"FILA got floor {floor} and spread {spread}; expected at least 0 and at least 1.")
    if forget.shape != retain.shape:
        raise DataError(
            f"the Fishers of forget set and retained data have the shapes {tuple(forget.shape)} and "
            f"{tuple(retain.shape)}; expected equal ones."
        )
    wide = forget.detach().double(), retain.detach().double()
    for value in wide:
        if not bool(((value >= 0) & value.isfinite()).all()):
            raise DataError(
                "a Fisher holds a number that is negative or not finite; it is a mean of squares."
            )
    return wide


def _floored(retain: Tensor, floor: float) -> Tensor:
    mean = float(retain.mean())
    if mean == 0:
        return torch.ones_like(retain)  # nothing known of the retained data: the forget set decides alone
    return retain + max(floor * mean, torch.finfo(torch.float64).tiny)


def _weights(squares: Tensor, spread: float) -> Tensor:
    mean = float(squares.mean())
    if mean == 0:
        return torch.ones_like(squares)
    return (squares / mean).sqrt().clamp(1 / spread, spread)


def weight_fisher(
    weights: Mapping[str, nn.Parameter], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """Diagonal empirical Fisher of whole weights, exact and per sample.

    Args:
        weights: name to parameter; they need not require gradients, and do so again only if they did.
        losses: one function a sample; each returns the sample's negative log-likelihood (a sum over its tokens) as a
            graph over the weights.

    Returns:
        Name to the mean of squared gradients, shaped like the weight, float64.

    Raises:
        DataError: there is no sample.
    """
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in losses:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += gradient.double().square()
            count += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])
    if not count:
        raise DataError("a Fisher needs at least one sample; got none.")
    return {name: value / count for name, value in total.items()}
