"""A client's samples, ready to train on: tokenised once, features from the cache, drawn in a reproducible order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fednano.data import Sample
from fednano.errors import DataError
from fednano.models.edge import NanoEdge
from fednano.models.prompt import Prompt
from fednano.training.features import FeatureCache
from fednano.training.seeds import generator

__all__ = ["ClientData", "draw"]


class ClientData:
    """Samples of one client together with what the edge needs of them.

    Args:
        samples: the client's samples, in a fixed order.
        edge: tokenises the text.
        features: encodes the images.

    Raises:
        DataError: there are no samples.
    """

    def __init__(self, samples: Sequence[Sample], edge: NanoEdge, features: FeatureCache) -> None:
        if not samples:
            raise DataError(
                "this client has no samples to train on. Give it data, or lower the number of clients or raise "
                "alpha so that every partition holds some."
            )
        self.samples = samples
        self._edge = edge
        self._features = features

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> tuple[list[Prompt], list[Tensor | None]]:
        """Prompts with answers, and features ``(image_tokens, d)``, of the samples at ``indices``."""
        return [self._prompt(index) for index in indices], self._features.get(
            [self.samples[index] for index in indices]
        )

    def warm(self, indices: Sequence[int]) -> None:
        """Encode the images of the samples at ``indices`` that no cache holds yet."""
        self._features.warm([self.samples[index] for index in indices])

    def _prompt(self, index: int) -> Prompt:
        sample = self.samples[index]  # the edge keeps what it has tokenised
        return self._edge.edge.prompt(
            sample.question, sample.answer, image=sample.image is not None, history=sample.history
        )


def draw(available: int, count: int, *, seed: int, client: str, start: int) -> list[int]:
    """Positions ``start .. start + count`` of an endless stream of shuffled epochs over ``available`` samples.

    Rounds continue where the last one stopped without keeping state: every sample is seen once before any is seen
    twice, and a resumed run draws what the uninterrupted one would have drawn.
    """
    chosen: list[int] = []
    position = start
    while len(chosen) < count:
        epoch, offset = divmod(position, available)
        order = generator(seed, "epoch", client, epoch).permutation(available)
        taken = order[offset : offset + count - len(chosen)]
        chosen.extend(int(index) for index in taken)
        position += len(taken)
    return chosen
