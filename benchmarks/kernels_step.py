"""Benchmark cases of a client's work as a whole: encoder, connector, NanoAdapters, optimiser; and its Fisher.

The client's side of LLaVA-1.5-7B with random weights, in bfloat16, with adapters of rank 64 in float32. The language
model is not part of it: what a host would send back is a fixed gradient at the embeddings. The peer is the same step
with adapters as PEFT writes them (two linear layers, casts, a scale and a sum) and torch's own AdamW.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels_report import Report
from benchmarks.kernels_timing import measure, peak_extra
from benchmarks.random_edge import random_edge
from fednano.adapters import create
from fednano.models.edge import NanoEdge
from fednano.models.prompt import Prompt
from fednano.training import fisher
from fednano.training.local import adapter_leaves
from fednano.training.steps import Steps, optimizer_steps

IMAGE = 3  # the placeholder's token id


@dataclass(frozen=True)
class Shape:
    """Sizes of a client.

    Attributes:
        vision: of the vision tower, for ``CLIPVisionConfig``.
        width: of an embedding.
        vocabulary: rows of the token table.
        text: tokens of a sample beside its image.
        rank: of the adapters.
        dtype: of encoder and embeddings.
    """

    vision: dict[str, int]
    width: int
    vocabulary: int
    text: int
    rank: int
    dtype: torch.dtype


FULL = Shape(
    {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        **{"num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    },
    *(4096, 32064, 124, 64, torch.bfloat16),
)
TINY = Shape(
    {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    },
    *(32, 50, 6, 4, torch.float32),
)


class PeftStyle(nn.Module):
    """``x + scale * B(gelu(A(x)))`` as PEFT's layers spell it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.dropout, self.scaling = nn.Identity(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` to ``(..., d)``."""
        result, x_ = x, x.to(self.lora_A.weight.dtype)
        result = result + self.lora_B(nn.functional.gelu(self.lora_A(self.dropout(x_)))) * self.scaling
        return result.to(x.dtype)


class Client:
    """One client's step over a batch that stays the same."""

    def __init__(self, shape: Shape, samples: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        with device:
            self.part = random_edge(shape.vision, shape.width, shape.vocabulary, IMAGE).to(shape.dtype)
        side = shape.vision["image_size"]
        self.pixels = torch.randn(samples, 3, side, side, device=device, dtype=shape.dtype)
        ids = (5, IMAGE, *(7 + i % 20 for i in range(shape.text - 2)))
        self.prompts = [Prompt(ids, (6,)) for _ in range(samples)]
        self.kept = list(self.part.encode({"pixel_values": self.pixels}))
        self.edge = NanoEdge(
            self.part, {s: create("nano", rank=shape.rank, act="gelu") for s in ("image", "text")}, seed=0
        ).to(device)
        self.peft = {stream: PeftStyle(shape.width, shape.rank).to(device) for stream in ("image", "text")}
        with torch.no_grad():
            for stream, layer in self.peft.items():
                theta = self.edge.layer(stream).theta
                theta["B"].normal_(std=0.02)
                layer.lora_A.weight.copy_(theta["A"].T)
                layer.lora_B.weight.copy_(theta["B"].T)
            self.batch = self.edge.assemble(self.prompts, self.kept)
            self.pull = torch.randn_like(self.batch.raw) * self.batch.mask.unsqueeze(-1)

    def features(self, encode: bool) -> list[Tensor | None]:
        """Of the batch's images, encoded now or kept from before."""
        return list(self.part.encode({"pixel_values": self.pixels})) if encode else list(self.kept)

    def peft_leaves(self) -> list[nn.Parameter]:
        """What the peer trains."""
        return [parameter for layer in self.peft.values() for parameter in layer.parameters()]

    def ours(self, steps: Steps, encode: bool) -> None:
        """One step as `train_local` makes it."""
        embeds = self.edge(self.prompts, self.features(encode)).embeds
        steps.zero_grad()
        torch.autograd.backward(embeds, self.pull)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in steps.gradients())
        steps.step()

    def theirs(self, optimizer: torch.optim.Optimizer, encode: bool) -> None:
        """The same step with PEFT's kind of layers."""
        batch = self.edge.assemble(self.prompts, self.features(encode))
        embeds = batch.raw
        for stream, layer in self.peft.items():
            where = batch.streams[stream]
            embeds = embeds.masked_scatter(where.unsqueeze(-1), layer(batch.raw[where]))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(embeds, self.pull)
        assert all(bool(torch.isfinite(p.grad).all()) for p in self.peft_leaves() if p.grad is not None)
        optimizer.step()

    def squares(self, fused: bool) -> dict[str, Tensor]:
        """The Fisher of the image adapter's leaves, summed over the batch."""
        layer = self.edge.layer("image")
        own = self.pull * self.batch.streams["image"].unsqueeze(-1)
        if fused:
            found = fisher._fused_squares(layer, self.batch.raw, own)
            assert found is not None
            return found
        each = fisher._each(layer, self.batch.raw, own)
        return {leaf: value.double().square().sum(dim=0) for leaf, value in each.items()}


@contextmanager
def kernels(mode: str) -> Iterator[None]:
    """``FEDNANO_KERNELS`` for a while."""
    before = os.environ.get("FEDNANO_KERNELS")
    os.environ["FEDNANO_KERNELS"] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["FEDNANO_KERNELS"]
        else:
            os.environ["FEDNANO_KERNELS"] = before


def step_variants(client: Client, stack: ExitStack, encode: bool) -> dict[str, Callable[[int], Any]]:
    """Ours, ours in plain torch, and PEFT's, each with an optimiser of its own that lives as long as ``stack``."""

    def enter(mode: str, edge: NanoEdge) -> Steps:
        with kernels(mode):
            return stack.enter_context(
                optimizer_steps(list(adapter_leaves(edge).values()), "adamw", learning_rate=1e-5)
            )

    plain = replace_edge(client)
    fused_steps, plain_steps = enter("on", client.edge), enter("off", plain.edge)
    optimizer = torch.optim.AdamW(client.peft_leaves(), lr=1e-5)

    def run(which: Client, steps: Steps, mode: str) -> Callable[[int], None]:
        def once(_: int) -> None:
            with kernels(mode):
                which.ours(steps, encode)

        return once

    return {
        "fused": run(client, fused_steps, "on"),
        "plain torch": run(plain, plain_steps, "off"),
        "PEFT-style": lambda _: client.theirs(optimizer, encode),
    }


def replace_edge(client: Client) -> Client:
    """The same client with adapters of its own."""
    twin = object.__new__(Client)
    twin.__dict__.update(client.__dict__)
    adapter = client.edge.layer("image").adapter
    twin.edge = NanoEdge(client.part, dict.fromkeys(("image", "text"), adapter), seed=0).to(client.device)
    twin.edge.load_travelling(client.edge.travelling())
    return twin


def step_cases(report: Report) -> None:
    """The step with images encoded and with their features kept, and the Fisher of one batch."""
    for samples in (1, 8):
        client = Client(FULL, samples, torch.device("cuda"))
        for encode in (True, False):
            with ExitStack() as stack:
                case = f"{samples} x 700 tokens, {'images encoded' if encode else 'features kept'}"
                variants = step_variants(client, stack, encode)
                _row(report, "client step", case, variants, "PEFT-style")
        squares: dict[str, Callable[[int], Any]] = {
            "fused": partial(_squares, client, True),
            "per-sample gradients": partial(_squares, client, False),
        }
        case = f"{samples} x 700 tokens, r={FULL.rank}"
        _row(report, "client Fisher", case, squares, "per-sample gradients")
        del client, squares
        torch.cuda.empty_cache()


def _squares(client: Client, fused: bool, _: int) -> None:
    with kernels("on"):
        client.squares(fused)


def _row(report: Report, what: str, case: str, variants: dict[str, Callable[[int], Any]], base: str) -> None:
    """Time and peak memory of each variant, called from Python: what is between the launches belongs to it."""
    times = measure(variants, 1, graph=False, window_ms=60.0)
    peaks = {name: peak_extra(partial(run, 0)) for name, run in variants.items()}
    report.row(what, case, "whole", "eager", times, base=base, peak_bytes=peaks)
