"""The steps of one party in one round of unlearning: the owner's forget and retain terms, or cross-entropy alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fednano.errors import ConfigError, TrainingDiverged
from fednano.models.edge import Composed, NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.data import ClientData, draw
from fednano.training.features import FeatureCache
from fednano.training.objectives import dpo, kl_divergence, npo, simnpo
from fednano.training.steps import OPTIMIZERS, optimizer_steps
from fednano.training.targets import without_end
from fednano.unlearning.methods import Method
from fednano.unlearning.probe import require_local

__all__ = ["REFUSAL", "LocalResult", "LocalSettings", "Reference", "reference_of", "refusals", "steps"]

REFUSAL = "I do not know."
"""What 'dpo' and 'idk' teach instead of the answer."""


@dataclass(frozen=True)
class LocalSettings:
    """How a party trains in one round.

    Attributes:
        steps: optimiser steps.
        batch_size: most samples a step, of each kind.
        learning_rate: step size.
        optimizer: a name in `fednano.training.steps.OPTIMIZERS`; its state starts afresh each round.
        clip_norm: largest gradient norm of a step; 0 switches clipping off.
        npo_beta: inverse temperature of NPO and DPO.
        simnpo_beta: that of SimNPO.
    """

    steps: int = 20
    batch_size: int = 16
    learning_rate: float = 3e-3
    optimizer: str = "adam"
    clip_norm: float = 0.0
    npo_beta: float = 0.1
    simnpo_beta: float = 4.5

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}; expected one of {sorted(OPTIMIZERS)}.")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("learning_rate", "npo_beta", "simnpo_beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; expected a positive number.")


@dataclass(frozen=True)
class LocalResult:
    """What a party did in a round.

    Attributes:
        forget_loss: mean forget term, as it was met; ``None`` for parties that forget nothing.
        retain_loss: mean retain term; ``None`` where the method has none.
        samples: samples gone through.
        steps: optimiser steps.
        seconds: wall time.
    """

    forget_loss: float | None
    retain_loss: float | None
    samples: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Reference:
    """The model before unlearning, as far as a method's loss looks back at it.

    Attributes:
        leaves: its adapter leaves.
        forget: ``(N,)`` negative log-likelihood of each answer to forget.
        refusal: ``(N,)`` of the refusal in its place.
    """

    leaves: Mapping[str, Tensor]
    forget: Tensor
    refusal: Tensor


def refusals(data: ClientData, edge: NanoEdge, features: FeatureCache) -> ClientData:
    """The same questions with `REFUSAL` as the answer."""
    return ClientData([replace(sample, answer=REFUSAL) for sample in data.samples], edge, features)


def _nll(edge: NanoEdge, llm: LanguageModel, batch: Composed, *, end: bool) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each answer ``(B,)``, summed over tokens, and their numbers ``(B,)``."""
    labels = batch.labels if end else without_end(batch.labels, edge.edge.tokenizer.eos_token_id)
    losses = llm.loss(batch.embeds, batch.mask, labels, images=batch.images)
    tokens = (labels != -100).sum(dim=1).to(losses)
    return losses * tokens, tokens


@torch.no_grad()
def reference_of(
    edge: NanoEdge, llm: LanguageModel, forget: ClientData, refusal: ClientData, *, batch_size: int = 32
) -> Reference:
    """Look at the adapters of ``edge`` as the model before unlearning."""

    def all_of(data: ClientData, *, end: bool) -> Tensor:
        parts = []
        for start in range(0, len(data), batch_size):
            batch = edge(*data.batch(range(start, min(start + batch_size, len(data)))))
            parts.append(_nll(edge, llm, batch, end=end)[0])
        return torch.cat(parts)

    return Reference(edge.travelling(), all_of(forget, end=False), all_of(refusal, end=True))


def steps(
    edge: NanoEdge,
    llm: LanguageModel,
    settings: LocalSettings,
    *,
    retain: ClientData | None,
    moving: Mapping[str, Tensor],
    seed: int,
    client: str,
    round_number: int,
    method: Method | None = None,
    forget: ClientData | None = None,
    refusal: ClientData | None = None,
    reference: Reference | None = None,
) -> LocalResult:
    """Train the adapters of ``edge`` in place for one round.

    Each step takes one batch of each kind and adds both terms, each the mean over its samples of the mean over the
    answer's tokens; the end token of a forgotten answer does not count.

    Args:
        edge: NanoEdge with the round's starting adapters.
        llm: the frozen language model; the method 'kl' needs it in this process.
        settings: how much and how.
        retain: the party's retained samples; ``None`` where it has none.
        moving: leaf to boolean tensor: elements that are false keep their bits.
        seed: with ``client`` and ``round_number`` it fixes the samples drawn.
        client: the party's name.
        round_number: counted from 1.
        method: for the owner; ``None``: cross-entropy on ``retain`` alone.
        forget: for the owner: the samples to forget.
        refusal: the same questions with the refusal, see `refusals`.
        reference: the model before, see `reference_of`.

    Raises:
        TrainingDiverged: a loss or a gradient is not finite.
        ConfigError: the method cannot work with this language model.
    """
    began = time.perf_counter()
    named = {
        f"{stream}.{leaf}": parameter
        for stream in edge.layers
        for leaf, parameter in edge.layer(stream).theta.items()
    }
    retain_kind = "cross_entropy" if method is None else method.retain
    kept = retain if retain_kind != "nothing" else None
    plan = _Plan(settings, seed, client, round_number)
    forget_batches = plan.batches(forget, "forget")
    retain_batches = plan.batches(kept, "retain")
    looking_back = []
    if kept is not None and retain_kind == "kl":
        assert reference is not None
        looking_back = _reference_logits(edge, llm, kept, retain_batches, reference)
    sums, samples = {"forget": 0.0, "retain": 0.0}, 0

    def compose(data: ClientData, indices: list[int]) -> Composed:
        batch: Composed = edge(*data.batch(indices))
        if not bool(torch.isfinite(batch.embeds.detach()).all()):
            raise _diverged(client, round_number, number + 1)
        return batch

    with optimizer_steps(
        list(named.values()),
        settings.optimizer,
        learning_rate=settings.learning_rate,
        clip_norm=settings.clip_norm,
    ) as optimizer:
        for number in range(settings.steps):
            terms: dict[str, Tensor] = {}
            if forget is not None and method is not None:
                indices = forget_batches[number]
                terms["forget"] = _forget_term(
                    *(edge, llm, method, settings, compose, forget, indices),
                    refusal=refusal,
                    reference=reference,
                )
                samples += len(indices)
            if kept is not None:
                indices = retain_batches[number]
                before = looking_back[number] if looking_back else None
                terms["retain"] = _retain_term(llm, compose(kept, indices), before)
                samples += len(indices)
            if not terms:
                break
            optimizer.zero_grad()
            total = torch.stack(list(terms.values())).sum()
            total.backward()  # type: ignore[no-untyped-call]
            gradients = optimizer.gradients()
            _keep_still(named, moving)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in (total.detach(), *gradients)):
                raise _diverged(client, round_number, number + 1)
            optimizer.step()
            for name, term in terms.items():
                sums[name] += float(term.detach())
    count = settings.steps
    return LocalResult(
        sums["forget"] / count if forget is not None and method is not None else None,
        sums["retain"] / count if kept is not None else None,
        samples,
        count,
        time.perf_counter() - began,
    )


@dataclass(frozen=True)
class _Plan:
    """Which samples each step of a round takes."""

    settings: LocalSettings
    seed: int
    client: str
    round_number: int

    def batches(self, data: ClientData | None, kind: str) -> list[list[int]]:
        if data is None:
            return []
        size = min(self.settings.batch_size, len(data))
        count = size * self.settings.steps
        order = draw(
            len(data),
            count,
            seed=self.seed,
            client=f"{self.client}/{kind}",
            start=(self.round_number - 1) * count,
        )
        data.warm(order)
        return [order[start : start + size] for start in range(0, count, size)]


def _forget_term(
    edge: NanoEdge,
    llm: LanguageModel,
    method: Method,
    settings: LocalSettings,
    compose: Callable[[ClientData, list[int]], Composed],
    forget: ClientData,
    indices: list[int],
    *,
    refusal: ClientData | None,
    reference: Reference | None,
) -> Tensor:
    if method.forget == "refusal":
        assert refusal is not None
        batch = compose(refusal, indices)
        return llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).mean()
    batch = compose(forget, indices)
    if method.forget in ("inverted_hinge", "gradient_ascent"):
        labels = without_end(batch.labels, edge.edge.tokenizer.eos_token_id)
        return llm.loss(batch.embeds, batch.mask, labels, method.forget, batch.images).mean()
    nll, tokens = _nll(edge, llm, batch, end=False)
    if method.forget == "simnpo":
        return simnpo(nll, tokens, settings.simnpo_beta).mean()
    assert reference is not None
    before = reference.forget[indices].to(nll)
    if method.forget == "npo":
        return npo(nll, before, settings.npo_beta).mean()
    assert refusal is not None
    preferred, _ = _nll(edge, llm, compose(refusal, indices), end=True)
    return dpo(preferred, reference.refusal[indices].to(nll), nll, before, settings.npo_beta).mean()


def _retain_term(llm: LanguageModel, batch: Composed, before: Tensor | None) -> Tensor:
    """What keeps retained samples: their loss, or the distance to the logits ``before`` at every token of theirs."""
    if before is None:
        return llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).mean()
    local = require_local(llm, "the method 'kl'")
    logits, _, counts = local.token_logits(batch.embeds, batch.mask, batch.labels, batch.images)
    each = kl_divergence(logits, before)
    return torch.stack([part.mean() for part in torch.split(each, counts)]).mean()


@torch.no_grad()
def _reference_logits(
    edge: NanoEdge, llm: LanguageModel, data: ClientData, batches: list[list[int]], reference: Reference
) -> list[Tensor]:
    """The model before, at every token of the round's retained batches: computed once, before the first step."""
    local, current = require_local(llm, "the method 'kl'"), edge.travelling()
    edge.load_travelling(reference.leaves)
    found = []
    for indices in batches:
        batch = edge(*data.batch(indices))
        found.append(local.token_logits(batch.embeds, batch.mask, batch.labels, batch.images)[0])
    edge.load_travelling(current)
    return found


def _keep_still(named: Mapping[str, torch.nn.Parameter], moving: Mapping[str, Tensor]) -> None:
    """Zero the gradient of what is not trained: Adam then leaves it alone, to the bit."""
    for name, parameter in named.items():
        assert parameter.grad is not None
        parameter.grad.mul_(moving[name].to(parameter.grad))


def _diverged(client: str, round_number: int, step: int) -> TrainingDiverged:
    return TrainingDiverged(
        f"{client}, round {round_number} of unlearning, step {step}: an adapter's output, a loss or a gradient is not "
        "finite. Lower the learning rate, or choose a bounded method such as 'loku'."
    )
