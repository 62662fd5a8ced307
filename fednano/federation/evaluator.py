"""The server's own view of the model: answers on the test set, through the same host that the clients use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fednano.data import KINDS, Sample
from fednano.errors import DataError
from fednano.evaluation import TITLES, perplexity
from fednano.federation.config import RunConfig
from fednano.federation.marking import metric_of, scores_of
from fednano.federation.model import load_data
from fednano.federation.schedules import fit_rank
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.answers import answer_losses, generate_answers, longest_answer
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

__all__ = ["Evaluator", "Judgement"]


@dataclass(frozen=True)
class Judgement:
    """One evaluation.

    Attributes:
        accuracy: score in [0, 1] by the run's metric; the share of exact matches where the setting ``metric`` and the
            data ask for nothing else.
        loss: mean answer loss, in nats a token, see `Evaluator.judge`; ``None`` where it was not asked for.
        answers: the answers, in the order of the samples.
        scores: every metric that fits the data, by name; perplexity where the loss is known and answers are free text.
    """

    accuracy: float
    loss: float | None
    answers: list[str]
    scores: dict[str, float] = field(default_factory=dict)


class Evaluator:
    """Judge adapters on the data set's test split.

    Args:
        config: the run's settings.
        edge: the server's NanoEdge.
        llm: the run's language model.
        cache: folder of encoder features.

    Raises:
        DataError: the data set has no test samples.
    """

    def __init__(self, config: RunConfig, edge: NanoEdge, llm: LanguageModel, cache: Path) -> None:
        self._config = config
        self._edge = edge
        self._llm = llm
        self._features = FeatureCache(edge.edge, cache)
        dataset = load_data(config, "test")
        self.bad_rows = list(dataset.bad_rows)
        """Rows of the test file that were left out, and why."""
        self._test, self._kind = dataset, dataset.kind
        if not len(dataset):
            raise DataError(
                f"the data set {config.dataset!r} has no test samples; the server judges by them."
            )
        self.metric = metric_of(config.metric, dataset)
        """What answers are judged by; `Judgement.accuracy` is in it."""
        self.title = TITLES[self.metric].replace("Accuracy", "accuracy")
        """The metric's name within a sentence."""

    def samples(self, count: int) -> Sequence[Sample]:
        """``count`` test samples spread evenly over the split; 0 = all."""
        total = len(self._test)
        if count == 0 or count >= total:
            return self._test
        return self._test.rows([index * total // count for index in range(count)])

    def judge(
        self, leaves: Mapping[str, Tensor], samples: Sequence[Sample], *, loss: bool = True
    ) -> Judgement:
        """Answer all samples with the adapters given, and compare with the right answers.

        The loss is always that of the samples of the evaluations between rounds, even where more are answered: one
        curve, on one set of questions.
        """
        fit_rank(self._edge, leaves)
        self._edge.load_travelling(leaves)
        answers = generate_answers(
            self._edge,
            self._llm,
            self._features,
            samples,
            max_new_tokens=self._config.max_new_tokens or longest_answer(self._edge, samples),
            width=self._config.host_workers,
        )
        scores = scores_of(self.metric, self._kind, answers, samples)
        found = self._loss(samples) if loss else None
        if found is not None and not KINDS[self._kind].classes:
            scores["perplexity"] = perplexity(found)
        return Judgement(scores[self.metric], found, answers, scores)

    def _loss(self, samples: Sequence[Sample]) -> float:
        fewer = self.samples(self._config.evaluate_samples)
        samples = fewer if len(fewer) < len(samples) else samples
        data = ClientData(samples, self._edge, self._features)
        losses = answer_losses(self._edge, self._llm, data, width=self._config.host_workers)
        return float(losses.double().mean())
