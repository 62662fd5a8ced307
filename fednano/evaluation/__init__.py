"""Metrics: of one answer, of many answers, of many clients."""

from fednano.evaluation.answers import exact_match, normalise, token_f1, vqa_accuracy
from fednano.evaluation.metrics import METRICS, TITLES, perplexity, score_by, score_each
from fednano.evaluation.rouge import Rouge, rouge_l
from fednano.evaluation.scores import ClientSpread, LabelScore, Scores, across_clients, score

__all__ = [
    "METRICS",
    "TITLES",
    "ClientSpread",
    "LabelScore",
    "Rouge",
    "Scores",
    "across_clients",
    "exact_match",
    "normalise",
    "perplexity",
    "rouge_l",
    "score",
    "score_by",
    "score_each",
    "token_f1",
    "vqa_accuracy",
]
