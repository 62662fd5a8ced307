"""What a step costs on the wire and at the client: bytes of each exchange, and the client's memory and time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

import host_model
from host_model import DEVICE, Shape
from random_edge import random_edge

from fednano.adapters import create
from fednano.host import RemoteLLM
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.factored import FactoredBatch, StreamFactors
from fednano.models.files import ModelFiles

SAMPLES = 8


def factored_batch(shape: Shape, streams: int) -> FactoredBatch:
    """A batch of long samples with adapters of the shape's rank on the image tokens, or on image and text."""
    length, width = shape.lengths[2], shape.width
    image = torch.arange(length).expand(SAMPLES, -1) < shape.image_tokens
    raw = torch.randn(SAMPLES, length, width).to(shape.dtype)
    labels = torch.full((SAMPLES, length), -100)
    labels[:, -8:] = 3
    mask = torch.ones(SAMPLES, length, dtype=torch.bool)
    parts = []
    for where in (image, ~image)[:streams]:
        z = (0.1 * torch.randn(int(where.sum()), shape.rank)).requires_grad_()
        up = (0.01 * torch.randn(shape.rank, width)).requires_grad_()
        parts.append(StreamFactors(where, z, up))
    return FactoredBatch(raw, mask, labels, tuple(parts))


def exchanges(shape: Shape, connect: Any, head: torch.nn.Module) -> list[dict[str, Any]]:
    """Bytes of a sample-step for each exchange, as they were sent and received; keeping samples is apart.

    Args:
        shape: sizes.
        connect: makes a `RemoteLLM` of keyword options.
        head: the model's, for a client that keeps its labels.
    """
    narrow = shape.dtype
    rows: list[dict[str, Any]] = []

    def count(name: str, llm: RemoteLLM, step: Any) -> None:
        before = llm.wire.step
        step()
        first = llm.wire.step
        step()
        second = llm.wire.step
        moved = [n.sent_bytes + n.received_bytes for n in (before, first, second)]
        rows.append(
            {
                "section": "bytes",
                "name": name,
                "bytes_per_sample_step": (moved[2] - moved[1]) / SAMPLES,
                "once_per_sample": max(moved[1] - moved[0] - (moved[2] - moved[1]), 0) / SAMPLES,
            }
        )

    for name, options in (
        ("full", {"wire_dtype": narrow}),
        ("full, lossless", {"wire_dtype": narrow, "lossless": True}),
        ("full, int8", {"wire_dtype": torch.int8}),
        ("label-private", {"wire_dtype": narrow, "head": head}),
    ):
        with connect(**options) as llm:
            batch = factored_batch(shape, 2)
            x = batch.embeds().detach()

            def full(llm: RemoteLLM = llm, x: torch.Tensor = x, batch: FactoredBatch = batch) -> None:
                leaf = x.detach().requires_grad_()
                llm.loss(leaf, batch.mask, batch.labels).sum().backward()  # type: ignore[no-untyped-call]

            count(name, llm, full)
    for streams in (2, 1):
        for name, wire, lossless in (
            ("factored", narrow, False),
            ("factored, lossless", narrow, True),
            ("factored, int8", torch.int8, False),
        ):
            with connect(wire_dtype=wire, factored=True, lossless=lossless) as llm:
                batch = factored_batch(shape, streams)

                def low(llm: RemoteLLM = llm, batch: FactoredBatch = batch) -> None:
                    llm.factored_loss(batch).mean().backward()  # type: ignore[no-untyped-call]

                count(name if streams == 2 else f"{name}, image stream alone", llm, low)
    return rows


def client_memory(shape: Shape, model: Any) -> list[dict[str, Any]]:
    """A NanoEdge of random weights against the whole model with LoRA inside it: memory and seconds of a step.

    The LoRA is PEFT's, of rank 32 on every linear layer of the LLM, as FlowerTune's clients train it; without PEFT that
    row is left out. The whole model is taken away from its host meanwhile and given back as it was.
    """
    rows = [_edge_step(shape)]
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError:
        print("  no peft here: the client with the whole model is left out")
        return rows
    host_model.settle()
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"))
    leaves = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(leaves, lr=1e-4)
    embeds, _, labels = host_model.inputs(shape, 1, shape.lengths[2], 64)
    targets = labels.to(DEVICE)

    def work() -> None:
        tuned(inputs_embeds=embeds, labels=targets, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    seconds = host_model.timed(work, seconds=1.0)
    held = sum(parameter.nbytes for parameter in tuned.parameters()) / 1e9
    rows.append(_client_row("whole LLM with PEFT LoRA r=32, batch 1", seconds, held, host_model.peak_gb()))
    tuned.unload()
    model.requires_grad_(False)
    return rows


def _edge_step(shape: Shape) -> dict[str, Any]:
    """Encoder and connector of random weights, with adapters behind them, one image a step. Token embeddings come from
    a file, as clients read them from a checkpoint."""
    host_model.settle()
    before = host_model.allocated()
    with TemporaryDirectory() as folder:
        edge = random_edge(shape.vision, shape.width, shape.config["vocab_size"]).to(shape.dtype)
        table = edge.token_embedding.weight
        assert isinstance(table, torch.Tensor)
        on_disk = table.nbytes / 1e9
        save_file({"embed_tokens.weight": table.detach().cpu()}, Path(folder) / "model.safetensors")
        edge.leave_table(ModelFiles("random", Path(folder)), lambda key: True)
        return _edge_row(shape, edge.to(DEVICE), before, on_disk)


def _edge_row(shape: Shape, edge: EdgePart, before: int, on_disk: float) -> dict[str, Any]:
    adapter = create("nano", rank=shape.rank)
    nano = NanoEdge(edge, {"image": adapter, "text": adapter}, seed=0).to(DEVICE)
    optimiser = torch.optim.AdamW([p for p in nano.parameters() if p.requires_grad], lr=1e-4)
    size = shape.vision["image_size"]
    pixels = torch.randn(1, 3, size, size, device=DEVICE, dtype=shape.dtype)
    ids = torch.randint(0, shape.config["vocab_size"], (shape.lengths[2] - shape.image_tokens,))

    def work() -> None:
        rows = {"image": edge.encode({"pixel_values": pixels})[0], "text": edge.embed(ids)}
        total = sum((nano.layer(stream)(part) ** 2).mean() for stream, part in rows.items())
        assert isinstance(total, torch.Tensor)
        total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()

    seconds = host_model.timed(work, seconds=1.0)
    held = sum(parameter.nbytes for parameter in nano.parameters()) / 1e9
    peak = host_model.peak_gb() - before / 1e9
    name = "NanoEdge with nano adapters, image encoded in each step"
    return _client_row(name, seconds, held, max(peak, 0.0), on_disk)


def _client_row(name: str, seconds: float, held: float, peak: float, on_disk: float = 0.0) -> dict[str, Any]:
    """What a client holds in memory, and what on disk (the same, and what stays there)."""
    sizes = {"weights_gb": held, "disk_gb": held + on_disk, "peak_gb": peak}
    return {"section": "client", "name": name, "seconds": seconds, **sizes}
