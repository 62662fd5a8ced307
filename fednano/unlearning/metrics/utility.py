"""Model utility (TOFU, arXiv 2401.06121): one number of nine, none of which can be bought with another."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fednano.errors import DataError

__all__ = ["UTILITY_PARTS", "model_utility"]

UTILITY_PARTS = tuple(
    f"{group}.{metric}"
    for group in ("retain", "real_authors", "world_facts")
    for metric in ("probability", "rouge_l", "truth_ratio")
)
"""Names of the nine parts: three sets of questions times three metrics."""


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the nine parts, in ``[0, 1]``; 0 where one of them is 0.

    Args:
        parts: each of `UTILITY_PARTS`, in ``[0, 1]``.

    Raises:
        DataError: a part is missing, unknown, or out of its range.
    """
    odd = sorted(set(parts) ^ set(UTILITY_PARTS))
    if odd:
        raise DataError(f"model utility has the nine parts {', '.join(UTILITY_PARTS)}; {odd} do not fit.")
    for name, value in parts.items():
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise DataError(f"the part {name} of model utility is {value}; expected a number in [0, 1].")
    if min(parts.values()) == 0:
        return 0.0
    return len(parts) / math.fsum(1 / value for value in parts.values())
