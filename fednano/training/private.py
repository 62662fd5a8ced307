"""Local training in which each sample's influence is bounded and covered by noise: DP-SGD (arXiv 1607.00133).

A step draws each sample independently with probability ``batch_size / samples of the client`` (Poisson sampling, which
is what the accountant counts), clips each drawn sample's gradient over all trained leaves to norm C, adds Gaussian
noise of standard deviation ``z C`` to their sum, and divides by the batch size. The optimiser, with momenta and
proximal term, sees nothing else of the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fednano.errors import TrainingDiverged
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.privacy.dp import Noise, clip_factor, norm
from fednano.training.data import ClientData
from fednano.training.fisher import per_sample_gradients
from fednano.training.local import TrainOutcome, TrainSettings, adapter_leaves
from fednano.training.steps import optimizer_steps

__all__ = ["Private", "private_gradient", "sampling_of", "train_private"]

_PART = 32  # samples whose gradients are held at the same time


@dataclass(frozen=True)
class Private:
    """How samples are protected.

    Attributes:
        clip: C, largest norm of one sample's gradient.
        noise: z, standard deviation of the noise over C.
    """

    clip: float
    noise: float


def sampling_of(data: ClientData, settings: TrainSettings) -> tuple[float, int]:
    """The rate at which a step draws each sample, and the steps of a round."""
    return min(1.0, settings.batch_size / len(data)), max(1, settings.samples // settings.batch_size)


def private_gradient(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    chosen: list[int],
    names: Collection[str],
    private: Private,
    noise: Noise,
    settings: TrainSettings,
) -> dict[str, Tensor]:
    """The noised mean gradient of a step, leaf name to a tensor of its shape.

    Args:
        edge: with the adapters.
        llm: the language model.
        data: the client's samples.
        chosen: those that the step has drawn; may be none.
        names: the trained leaves, over which the norm is taken.
        private: how samples are protected.
        noise: where the noise comes from.
        settings: batch size and objective.
    """
    leaves = adapter_leaves(edge)
    total = {name: torch.zeros(leaves[name].shape, dtype=torch.float64) for name in names}
    for start in range(0, len(chosen), _PART):
        part = per_sample_gradients(
            *(edge, llm, data, chosen[start : start + _PART]), objective=settings.objective, by_token=False
        )
        for i in range(len(chosen[start : start + _PART])):
            own = [part[name][i] for name in names]
            factor = clip_factor(norm(own), private.clip)
            for name, gradient in zip(names, own, strict=True):
                if factor:  # a gradient that is not finite counts as none
                    total[name].add_(gradient.double().cpu(), alpha=factor)
    return {
        name: (value + private.clip * private.noise * noise.normal(tuple(value.shape))) / settings.batch_size
        for name, value in total.items()
    }


def train_private(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    settings: TrainSettings,
    private: Private,
    *,
    client: str,
    round_number: int,
    frozen: Collection[str] = (),
    noise: Noise | None = None,
) -> TrainOutcome:
    """Train the adapters of ``edge`` in place for one round.

    Args:
        edge: NanoEdge with the round's starting adapters.
        llm: the frozen language model, here or on a host, which sees each drawn sample as it is.
        data: the client's samples.
        settings: how much and how; a round has ``samples // batch_size`` steps.
        private: how samples are protected.
        client: the client's stable name, for errors.
        round_number: counted from 1, for errors.
        frozen: leaves that keep their bits.
        noise: where noise and draws come from; the operating system unless a test says otherwise.

    Returns:
        What happened; the loss is NaN, since nobody covered it with noise.

    Raises:
        TrainingDiverged: the adapters are no longer finite.
    """
    started, noise = time.perf_counter(), noise or Noise()
    named = {
        name: leaf for name, leaf in adapter_leaves(edge).items() if leaf.requires_grad and name not in frozen
    }
    rate, count = sampling_of(data, settings)
    seen = 0
    with optimizer_steps(
        list(named.values()),
        settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        proximal_mu=settings.proximal_mu,
        clip_norm=settings.clip_norm,
    ) as steps:
        for step in range(1, count + 1):
            chosen = noise.coins(len(data), rate)
            data.warm(chosen)
            gradient = private_gradient(edge, llm, data, chosen, list(named), private, noise, settings)
            steps.zero_grad()
            steps.gradients()
            for name, leaf in named.items():
                assert leaf.grad is not None
                leaf.grad.copy_(gradient[name])
            steps.step()
            if not all(bool(torch.isfinite(leaf).all()) for leaf in named.values()):
                raise TrainingDiverged(
                    f"client {client}, round {round_number}, step {step}: the adapters are not finite. Lower the "
                    "learning rate or dp-noise."
                )
            seen += len(chosen)
    return TrainOutcome(math.nan, seen, count, time.perf_counter() - started)
