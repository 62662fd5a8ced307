"""The server's own view of the model: answers on the test set, through the same host that the clients use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fednano.data import Sample, load_dataset
from fednano.errors import DataError
from fednano.evaluation import exact_match
from fednano.federation.config import RunConfig
from fednano.federation.schedules import fit_rank
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.answers import answer_losses, generate_answers
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

__all__ = ["Evaluator", "Judgement"]


@dataclass(frozen=True)
class Judgement:
    """One evaluation.

    Attributes:
        accuracy: share of exact matches.
        loss: mean answer loss, in nats a token, see `Evaluator.judge`; ``None`` where it was not asked for.
        answers: the answers, in the order of the samples.
    """

    accuracy: float
    loss: float | None
    answers: list[str]


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
        dataset = load_dataset(config.dataset, "test")
        self.bad_rows = list(dataset.bad_rows)
        """Rows of the test file that were left out, and why."""
        self._test = list(dataset)
        if not self._test:
            raise DataError(
                f"the data set {config.dataset!r} has no test samples; the server judges by them."
            )

    def samples(self, count: int) -> list[Sample]:
        """``count`` test samples spread evenly over the split; 0 = all."""
        total = len(self._test)
        if count == 0 or count >= total:
            return self._test
        return [self._test[index * total // count] for index in range(count)]

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
            max_new_tokens=self._config.max_new_tokens,
            width=self._config.host_workers,
        )
        right = sum(exact_match(got, sample.answer) for got, sample in zip(answers, samples, strict=True))
        return Judgement(right / len(samples), self._loss(samples) if loss else None, answers)

    def _loss(self, samples: Sequence[Sample]) -> float:
        fewer = self.samples(self._config.evaluate_samples)
        samples = fewer if len(fewer) < len(samples) else samples
        data = ClientData(samples, self._edge, self._features)
        losses = answer_losses(self._edge, self._llm, data, width=self._config.host_workers)
        return float(losses.double().mean())
