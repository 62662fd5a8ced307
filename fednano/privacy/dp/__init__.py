"""Differential privacy: clipping, Gaussian noise, and what they cost, counted by Opacus' accountant.

Knows nothing of adapters and rounds. Two records are neighbours when one has a unit (a client, or a sample) more.
"""

from fednano.privacy.dp.accountant import BudgetSpent, Ledger
from fednano.privacy.dp.mechanism import Noise, clip_factor, norm

__all__ = ["BudgetSpent", "Ledger", "Noise", "clip_factor", "norm"]
