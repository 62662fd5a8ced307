"""What was spent: Rényi differential privacy (Mironov, arXiv 1702.07476; sampled Gaussian: arXiv 1908.10530).

The numbers are Opacus' (`opacus.accountants`); here they are kept and added up. Costs of different noise or sampling
add up order by order, and are turned into (epsilon, delta) once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from fednano.errors import ConfigError, FednanoError

__all__ = ["BudgetSpent", "Ledger"]

_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [2**n for n in range(6, 11)]


class BudgetSpent(FednanoError):
    """The next step would cost more than the privacy budget allows; it is not taken."""


@dataclass(frozen=True)
class Ledger:
    """Releases so far.

    Attributes:
        spent: noise multiplier and sampling rate to number of releases.
    """

    spent: dict[tuple[float, float], int] = field(default_factory=dict)

    def after(self, noise: float, rate: float, releases: int) -> Ledger:
        """With further releases.

        Args:
            noise: standard deviation of the noise over the clipping norm.
            rate: probability with which a unit takes part in a release, drawn independently and in secret; 1: it does.
            releases: how many.

        Raises:
            ConfigError: a number is out of its range.
        """
        if not (noise > 0 and math.isfinite(noise) and 0 < rate <= 1 and releases >= 0):
            raise ConfigError(
                f"a release with noise {noise} at rate {rate}, {releases} times; expected noise > 0, rate <= 1."
            )
        key = (noise, rate)
        return replace(self, spent={**self.spent, key: self.spent.get(key, 0) + releases})

    def epsilon(self, delta: float) -> float:
        """Epsilon of all releases together at ``delta``; 0 without any."""
        if not any(self.spent.values()):
            return 0.0
        import numpy as np
        from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

        total: Any = np.zeros(len(_ORDERS))
        for (noise, rate), releases in self.spent.items():
            total = total + np.asarray(
                compute_rdp(q=rate, noise_multiplier=noise, steps=releases, orders=_ORDERS)
            )
        import warnings

        with warnings.catch_warnings():  # that the best order is the first or last one: still a bound
            warnings.simplefilter("ignore")
            epsilon, _ = get_privacy_spent(orders=_ORDERS, rdp=total, delta=delta)
        return float(epsilon)

    def require(self, budget: float, delta: float) -> None:
        """Raises BudgetSpent where these releases cost more than ``budget``; 0 is no budget."""
        if budget and (epsilon := self.epsilon(delta)) > budget:
            raise BudgetSpent(
                f"going on would cost epsilon {epsilon:.4g} at delta {delta:g}, the budget is {budget:g} (dp-epsilon)."
            )

    def to_json(self) -> list[list[float]]:
        """Rows of noise, rate, releases."""
        return [[noise, rate, releases] for (noise, rate), releases in self.spent.items()]

    @classmethod
    def from_json(cls, rows: Iterable[Iterable[float]]) -> Ledger:
        """Inverse of `to_json`."""
        return cls({(float(noise), float(rate)): int(releases) for noise, rate, releases in rows})
