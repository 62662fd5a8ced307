"""Truth ratio and forget quality (TOFU: Maini et al., arXiv 2401.06121).

With ``l`` the mean loss of an answer in nats a token, the truth ratio of a question is
``R = exp(-mean_k l(wrong_k)) / exp(-l(paraphrase))``: below 1 where the model prefers the truth. Two formulas are in
use for several wrong answers: the geometric mean above (TOFU's tables) and the arithmetic mean of ``exp(-l(wrong_k))``.

Forget quality is the p-value of a two-sample Kolmogorov-Smirnov test between the truth ratios of the unlearned model
and of one that was trained without the forget set. A p-value depends on the number of questions, so the statistic and
both numbers stand beside it. Without such a reference there is no forget quality.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fednano.errors import ConfigError, DataError

__all__ = ["ForgetQuality", "forget_quality", "truth_ratio", "truth_ratio_score"]


def truth_ratio(wrong: Sequence[float], paraphrase: float, *, mean: str = "geometric") -> float:
    """Truth ratio of one question, 0 or above.

    Args:
        wrong: ``(K,)`` mean losses of the wrong answers, ``K >= 1``, nats a token.
        paraphrase: mean loss of the right answer in other words.
        mean: ``"geometric"`` or ``"arithmetic"``, see the module.

    Raises:
        DataError: there is no wrong answer, or a loss is not finite.
        ConfigError: ``mean`` is something else.
    """
    losses = np.asarray(wrong, dtype=float)
    if losses.ndim != 1 or not losses.size or not np.isfinite(losses).all() or not math.isfinite(paraphrase):
        raise DataError(
            f"a truth ratio needs finite losses of at least one wrong answer and of the paraphrase; got "
            f"{losses.tolist()!r:.80} and {paraphrase}."
        )
    if mean == "geometric":
        return float(np.exp(paraphrase - losses.mean()))
    if mean == "arithmetic":
        return float(np.exp(paraphrase - losses).mean())
    raise ConfigError(f"the truth ratio's mean is {mean!r}; expected 'geometric' or 'arithmetic'.")


def truth_ratio_score(ratios: Sequence[float], *, forget: bool) -> float:
    """One number of many truth ratios, in ``[0, 1]``, higher is better.

    Args:
        ratios: ``(N,)`` truth ratios.
        forget: of the forget set: ``mean min(R, 1/R)``, best where truth and falsehood look alike; otherwise
            ``mean max(0, 1 - R)``, best where the model knows the truth.
    """
    values = np.asarray(ratios, dtype=float)
    if not values.size:
        raise DataError("there is no truth ratio to average; give at least one question.")
    if not forget:
        return float(np.maximum(0.0, 1 - values).mean())
    with np.errstate(divide="ignore"):
        return float(np.minimum(values, 1 / values).mean())


@dataclass(frozen=True)
class ForgetQuality:
    """A two-sample Kolmogorov-Smirnov test.

    Attributes:
        p: the p-value: 1 where unlearned and retrained model cannot be told apart.
        statistic: largest distance between the two distribution functions.
        n: number of the unlearned model's truth ratios.
        n_reference: number of the reference's.
    """

    p: float
    statistic: float
    n: int
    n_reference: int

    @property
    def log10_p(self) -> float:
        """``log10`` of the p-value, in which figures show it; minus infinity for 0."""
        return math.log10(self.p) if self.p > 0 else -math.inf


def forget_quality(unlearned: Sequence[float], reference: Sequence[float]) -> ForgetQuality:
    """Compare truth ratios of the forget set under two models.

    Args:
        unlearned: ``(n,)``, of the model after unlearning.
        reference: ``(m,)``, of a model trained without the forget set, on the same questions.

    Raises:
        DataError: one of them is empty or holds a number that is not finite.
    """
    first, second = np.asarray(unlearned, dtype=float), np.asarray(reference, dtype=float)
    if not first.size or not second.size or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise DataError(
            f"forget quality needs finite truth ratios of both models; got {first.size} and {second.size} numbers."
        )
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        # Where the exact p is 1, rounding may carry it past 1; scipy then says so and takes the asymptotic one, also 1.
        warnings.filterwarnings("ignore", "ks_2samp: Exact calculation unsuccessful", RuntimeWarning)
        result = ks_2samp(first, second)
    return ForgetQuality(float(result.pvalue), float(result.statistic), first.size, second.size)
