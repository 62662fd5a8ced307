"""How much of the forgotten is left, and what of the rest: metrics of unlearning as published.

Everything here works on plain numbers; `fednano.unlearning.measure` gets them out of a model.
"""

from fednano.evaluation import Rouge, rouge_l
from fednano.unlearning.metrics.memorisation import (
    TokenScores,
    exact_memorisation,
    extraction_likelihood,
    extraction_strength,
    inverted_hinge_score,
    memorisation_accuracy,
    probability,
)
from fednano.unlearning.metrics.privacy import (
    MIN_K,
    Auc,
    attack_auc,
    auc,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    priv_leak,
    reference_score,
    zlib_score,
)
from fednano.unlearning.metrics.quality import ForgetQuality, forget_quality, truth_ratio, truth_ratio_score
from fednano.unlearning.metrics.tofu import TofuReport, evaluate_tofu, read_log
from fednano.unlearning.metrics.utility import UTILITY_PARTS, model_utility

__all__ = [
    "MIN_K",
    "UTILITY_PARTS",
    "Auc",
    "ForgetQuality",
    "Rouge",
    "TofuReport",
    "TokenScores",
    "attack_auc",
    "auc",
    "evaluate_tofu",
    "exact_memorisation",
    "extraction_likelihood",
    "extraction_strength",
    "forget_quality",
    "inverted_hinge_score",
    "loss_score",
    "memorisation_accuracy",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "priv_leak",
    "probability",
    "read_log",
    "reference_score",
    "rouge_l",
    "truth_ratio",
    "truth_ratio_score",
    "zlib_score",
]
