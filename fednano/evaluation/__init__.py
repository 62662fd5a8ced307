"""Metrics: of one answer, of many answers, of many clients."""

from fednano.evaluation.answers import exact_match, normalise, token_f1, vqa_accuracy
from fednano.evaluation.scores import ClientSpread, LabelScore, Scores, across_clients, score

__all__ = [
    "ClientSpread",
    "LabelScore",
    "Scores",
    "across_clients",
    "exact_match",
    "normalise",
    "score",
    "token_f1",
    "vqa_accuracy",
]
