"""Local training: some steps of one client's adapters against a language model it need not hold.

The loop cannot tell a local model from a hosted one; both are a :class:`fednano.models.language.LanguageModel`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fednano.errors import ConfigError, TrainingDiverged
from fednano.models.edge import NanoEdge
from fednano.models.factored import FactoredModel
from fednano.models.language import LanguageModel
from fednano.models.prompt import Prompt
from fednano.training.data import ClientData, draw
from fednano.training.guard import Guard, guard_loss
from fednano.training.steps import OPTIMIZERS, optimizer_steps

__all__ = [
    "TrainOutcome",
    "TrainSettings",
    "adapter_leaves",
    "mean_loss",
    "round_samples",
    "train_local",
]


@dataclass(frozen=True)
class TrainSettings:
    """What one client does in one round.

    Attributes:
        samples: training samples a round.
        batch_size: samples a step; the last step may be smaller.
        optimizer: a name in :data:`OPTIMIZERS`; its state starts afresh each round.
        learning_rate: step size.
        weight_decay: passed to the optimiser.
        proximal_mu: weight of FedProx's term ``mu/2 |theta - theta_round|^2`` (arXiv:1812.06127); 0 switches it off.
        clip_norm: largest gradient norm of a step; 0 switches clipping off.
        objective: loss asked of the language model.
    """

    samples: int = 300
    batch_size: int = 32
    optimizer: str = "adam"
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    clip_norm: float = 0.0
    objective: str = "cross_entropy"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}; expected one of {sorted(OPTIMIZERS)}.")
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(
                f"learning_rate is {self.learning_rate}; expected a positive number such as 0.003."
            )
        for name in ("weight_decay", "proximal_mu", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; expected 0 or a positive number.")


@dataclass(frozen=True)
class TrainOutcome:
    """What happened in one client's round.

    Attributes:
        loss: mean loss over the samples, as they were met.
        samples: samples trained on.
        steps: optimiser steps.
        seconds: wall time.
        guard_loss: mean inverted hinge loss of what is kept forgotten, without its weight; ``None``: nothing is.
    """

    loss: float
    samples: int
    steps: int
    seconds: float
    guard_loss: float | None = None


def train_local(
    edge: NanoEdge,
    llm: LanguageModel,
    data: ClientData,
    settings: TrainSettings,
    *,
    seed: int,
    client: str,
    round_number: int,
    frozen: Collection[str] = (),
    drift: Mapping[str, Tensor] | None = None,
    guard: Guard | None = None,
) -> TrainOutcome:
    """Train the adapters of ``edge`` in place for one round.

    Args:
        edge: NanoEdge with the round's starting adapters.
        llm: the frozen language model, here or on a host.
        data: the client's samples.
        settings: how much and how.
        seed: the run's seed; with ``client`` and ``round_number`` it fixes the samples drawn.
        client: the client's stable name.
        round_number: counted from 1.
        frozen: leaves ``"<stream>.<leaf>"`` that keep their bits.
        drift: leaf to a tensor of its shape that is added to its gradient in each step (SCAFFOLD's ``c - c_k``,
            arXiv:1910.06378).
        guard: forgotten samples that each step keeps forgotten.

    Raises:
        ConfigError: every leaf is frozen.
        TrainingDiverged: a loss or a gradient is not finite; the adapters are left as they were before that step.
        HostError: the language host refuses a step or is gone.
    """
    started = time.perf_counter()
    named = {
        name: parameter
        for name, parameter in adapter_leaves(edge).items()
        if parameter.requires_grad and name not in frozen
    }
    if not named:
        raise ConfigError(
            f"all leaves are frozen ({', '.join(sorted(frozen))}); expected one that is trained."
        )
    order = round_samples(data, settings, seed=seed, client=client, round_number=round_number)
    data.warm(order)
    total, held, count = 0.0, 0.0, 0
    steps_ahead = math.ceil(len(order) / settings.batch_size)
    forgotten = (
        guard.batches(settings.batch_size, steps_ahead, seed=seed, client=client, round_number=round_number)
        if guard
        else iter(())
    )
    with optimizer_steps(
        list(named.values()),
        settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        proximal_mu=settings.proximal_mu,
        clip_norm=settings.clip_norm,
    ) as steps:
        for start in range(0, len(order), settings.batch_size):
            where = f"client {client}, round {round_number}, step {count + 1}"
            prompts, features = data.batch(order[start : start + settings.batch_size])
            adapted, ask = _adapt(edge, llm, prompts, features, settings.objective)
            _check_finite(where, adapted)
            losses = ask()  # (B,)
            steps.zero_grad()
            losses.mean().backward()  # type: ignore[no-untyped-call]
            if guard:
                gone, chosen, weight = next(forgotten)
                known = guard_loss(edge, llm, gone, chosen)
                (weight * known).backward()  # type: ignore[no-untyped-call]
                held += float(known.detach())
            gradients = steps.gradients()
            for name, correction in (drift or {}).items():
                gradient = named[name].grad
                assert gradient is not None
                gradient.add_(correction.to(gradient))
            _check_finite(where, losses, *gradients)
            steps.step()
            total += float(losses.detach().sum())
            count += 1
    seconds = time.perf_counter() - started
    return TrainOutcome(total / len(order), len(order), count, seconds, held / count if guard else None)


def _adapt(
    edge: NanoEdge,
    llm: LanguageModel,
    prompts: Sequence[Prompt],
    features: Sequence[Tensor | None],
    objective: str,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """What the adapters make of a batch, and how to get its losses ``(B,)``: by low-rank parts where the model's user
    chose so and the adapters have such parts, else by whole embeddings."""
    if isinstance(llm, FactoredModel) and llm.wants_factored:
        parts = edge.factor(prompts, features)
        if parts is not None and parts.streams:
            flat = torch.cat([part.flatten() for stream in parts.streams for part in (stream.z, stream.up)])
            return flat, lambda: llm.factored_loss(parts, objective)
    batch = edge(prompts, features)
    return batch.embeds, lambda: llm.loss(batch.embeds, batch.mask, batch.labels, objective, batch.images)


def round_samples(
    data: ClientData, settings: TrainSettings, *, seed: int, client: str, round_number: int
) -> list[int]:
    """Indices of the samples of one round, in the order in which they are trained on."""
    start = (round_number - 1) * settings.samples
    return draw(len(data), settings.samples, seed=seed, client=client, start=start)


@torch.no_grad()
def mean_loss(
    edge: NanoEdge, llm: LanguageModel, data: ClientData, indices: Sequence[int], *, batch_size: int = 32
) -> float:
    """Mean loss of the adapters as they are over the samples at ``indices``, in nats a token."""
    total = 0.0
    for start in range(0, len(indices), batch_size):
        batch = edge(*data.batch(indices[start : start + batch_size]))
        total += float(llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).double().sum())
    return total / len(indices)


def adapter_leaves(edge: NanoEdge) -> dict[str, torch.nn.Parameter]:
    """The adapters' leaves by the name under which they travel, in the order of ``edge.parameters()``."""
    prefix = "layers."
    return {
        name.removeprefix(prefix).replace(".theta.", ".", 1): parameter
        for name, parameter in edge.named_parameters()
        if name.startswith(prefix)
    }


def _check_finite(where: str, *values: Tensor) -> None:
    """Refuse embeddings, losses or gradients that are not finite, before they do harm."""
    if not all(bool(torch.isfinite(value.detach()).all()) for value in values):
        raise TrainingDiverged(
            f"{where}: the adapters' output, the loss or a gradient is not finite. Lower the learning rate, or set a "
            "clip norm."
        )
