"""A language part of random weights, batches for it, and ``python tiny_host.py``: a host process that serves it."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fednano.models.language import LanguageModel, LanguagePart
from fednano.models.language_inputs import IGNORE

D, V, POSITIONS = 24, 53, 64
Batch = tuple[Tensor, Tensor, Tensor]


def make_batch(lengths: list[int], pads: list[int] | None = None, seed: int = 0) -> Batch:
    """Random embeddings ``(B, T, d)``, mask and labels; row i has ``pads[i]`` places of padding before it."""
    g = torch.Generator().manual_seed(seed)
    pads = pads or [0] * len(lengths)
    total = max(n + p for n, p in zip(lengths, pads, strict=True))
    embeds = torch.randn(len(lengths), total, D, generator=g)
    mask = torch.zeros(len(lengths), total, dtype=torch.bool)
    labels = torch.full((len(lengths), total), IGNORE)
    for i, (n, p) in enumerate(zip(lengths, pads, strict=True)):
        mask[i, p : p + n] = True
        row = torch.randint(V, (n,), generator=g)
        labels[i, p : p + n] = torch.where(torch.rand(n, generator=g) < 0.6, row, IGNORE)
        labels[i, p + n - 1] = row[-1]
    return embeds, mask, labels


def take_step(llm: LanguageModel, batch: Batch, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Losses ``(B,)`` and the gradient ``(B, T, d)`` of their weighted sum."""
    embeds, mask, labels = batch
    x = embeds.clone().requires_grad_()
    losses = llm.loss(x, mask, labels)
    total = losses.sum() if weights is None else (losses * weights).sum()
    (grad,) = torch.autograd.grad(total, x)
    return losses.detach(), grad


def tiny_part(seed: int = 0) -> LanguagePart:
    """The same weights in every process for the same seed."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=V,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        pad_token_id=0,
    )
    decoder = LlamaModel(config)
    head = torch.nn.Linear(D, V, bias=False)
    return LanguagePart(decoder, head, D, V, POSITIONS, (2, 3), 0, f"tiny-{seed}")


class RunningMean(torch.nn.Module):
    """The smallest causal decoder: each hidden state is a function of the mean of all inputs so far.

    For host processes: importing transformers would double their start.
    """

    def __init__(self, delay: float) -> None:
        super().__init__()
        self.mix, self.delay = torch.nn.Linear(D, D), delay

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, **_: object) -> SimpleNamespace:
        time.sleep(self.delay)
        mean = inputs_embeds.cumsum(1) / (position_ids.unsqueeze(-1) + 1)
        return SimpleNamespace(last_hidden_state=torch.tanh(self.mix(mean)))


def toy_part(seed: int = 0, delay: float = 0.0) -> LanguagePart:
    """A part for `loss` alone that loads at once; ``delay`` seconds are added to each computation."""
    torch.manual_seed(seed)
    decoder, head = RunningMean(delay), torch.nn.Linear(D, V, bias=False)
    return LanguagePart(decoder, head, D, V, POSITIONS, (2, 3), 0, f"toy-{seed}")


def step_in_child(remote: Any, queue: Any) -> None:
    """Take one step in another process and report losses, norm of the gradient, and samples counted."""
    torch.set_num_threads(1)
    losses, grad = take_step(remote, make_batch([4, 6], seed=5))
    queue.put((losses.tolist(), grad.double().norm().item(), remote.wire.step.samples))
    remote.close()


def load(name: str, dtype: str, device: str) -> LanguagePart:
    """``toy`` or ``toy-DELAY``, see `toy_part`."""
    return toy_part(delay=float(name.partition("-")[2] or 0))


if __name__ == "__main__":
    from fednano.host.cli import main

    sys.exit(main(load=load))
