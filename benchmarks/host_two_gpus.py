"""The language host over two GPUs: writes ``benchmarks/results/host_two_gpus.json``.

    python -m benchmarks.host_two_gpus [--tiny] [--seconds 6] [--json FILE]

LLaVA-1.5-7B's language part with random weights on one card and as a pipeline over both, then a model that one card
cannot hold; each trained by clients that are processes of their own, through the gRPC host on loopback. ``--tiny`` runs
the same program on any machine. On two H200s it takes about three minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import host_model
import torch
from host_model import Shape
from results import write_results
from torch import nn

from fednano.host import serve
from fednano.host.bench import row_of
from fednano.host.drive import Drivers, Load
from fednano.host.loading import LINGER_SECONDS
from fednano.models.language import LanguagePart, LocalLLM
from fednano.models.memory import PipelineMemory
from fednano.models.placing import block_devices, spread

RESULTS = Path(__file__).parent / "results" / "host_two_gpus.json"

# Llama's 70B shape with 96 blocks instead of 80: 82 billion parameters, 165 GB in bfloat16, so that one card of 141 GB
# cannot even hold its weights.
LARGE = replace(
    host_model.FULL,
    config={
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 96,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    },
)


def build(shape: Shape, devices: list[torch.device]) -> LanguagePart:
    """The language part of random weights, each made where it will lie: nothing of it is ever anywhere else."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(**shape.config, pad_token_id=0)
    with torch.device("meta"):
        decoder = LlamaModel(config).to(shape.dtype)
    places = block_devices(decoder, devices, [1.0] * len(devices))
    for name, device in places.items():
        module = decoder.get_submodule(name).to_empty(device=device)
        for weight in module.parameters():
            weight.requires_grad_(False)
            if weight.dim() > 1:
                weight.normal_(0.0, 0.02)
            else:
                weight.fill_(1.0)
    # Its buffers are computed from the configuration, so that there is nothing to fill them with.
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(devices[0])
    head = nn.Linear(
        shape.width, shape.config["vocab_size"], bias=False, dtype=shape.dtype, device=devices[-1]
    )
    head.weight.requires_grad_(False).normal_(0.0, 0.02)
    facts = (shape.width, shape.config["vocab_size"], shape.config["max_position_embeddings"], (2,), 0)
    return LanguagePart(decoder.eval(), head, *facts, "random-weights")


def measure(
    part: LanguagePart, shape: Shape, drivers: Drivers, name: str, clients: int, workers: int, seconds: float
) -> dict[str, Any]:
    """Clients of one sample each, at the shape's greatest length."""
    memory = PipelineMemory(part.devices, passes=workers) if part.devices[0].type == "cuda" else None
    llm = LocalLLM(part, memory=memory)
    if memory is not None:
        llm.passes.warm_up()
    length, gpu = shape.lengths[2], part.devices[0].type == "cuda"
    for device in _cards(part):
        torch.cuda.reset_peak_memory_stats(device)
    with serve(
        llm, workers=workers, batch_tokens=8192, linger_seconds=LINGER_SECONDS if gpu else 0.0, grace=5.0
    ) as host:
        load = Load(
            host.address,
            (length,) * clients,
            seconds=seconds,
            dtype=str(shape.dtype).removeprefix("torch."),
            answers=min(32, length // 4),
        )
        driven = drivers.run(load)
    weights = [weight for module in (part.decoder, part.head) for weight in module.parameters()]
    count = sum(weight.numel() for weight in weights)
    found = row_of(load, driven)
    row = {
        "section": "host",
        "name": name,
        "cards": len(part.devices) if gpu else 0,
        "workers": workers,
        **found,
        "errors": len(driven.errors),
        "parameters": count,
        "useful_tflops": 4 * count * found["tokens_per_second"] / 1e12,
        "weights_gb": [sum(w.nbytes for w in weights if w.device == device) / 1e9 for device in part.devices],
        "peak_gb": [torch.cuda.max_memory_allocated(device) / 1e9 for device in _cards(part)],
        "card_gb": [torch.cuda.get_device_properties(device).total_memory / 1e9 for device in _cards(part)],
    }
    for text in driven.errors[:3]:
        print(f"  {text}", flush=True)
    print(f"  {row}", flush=True)
    return row


def _cards(part: LanguagePart) -> list[torch.device]:
    return [device for device in part.devices if device.type == "cuda"]


def gradient(part: LanguagePart, shape: Shape) -> torch.Tensor:
    """The gradient of one batch, on the CPU."""
    draw = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, shape.lengths[1], shape.width, generator=draw).to(part.devices[0], shape.dtype)
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    labels = torch.full(embeds.shape[:2], 7)
    _, found = LocalLLM(part).passes.compute(embeds, mask, labels, "cross_entropy", True)
    assert found is not None
    return found.float().cpu()


def work(
    shape: Shape, large: Shape, devices: list[torch.device], drivers: Drivers, seconds: float, path: Path
) -> int:
    """All measurements; the file is written after each."""
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        write_results(path, rows=rows, gates=[])

    began = time.monotonic()
    part = build(shape, devices[:1])
    add(measure(part, shape, drivers, "7B, one card", 16, 1, seconds))
    alone = gradient(part, shape)
    part = spread(part, devices, [1.0] * len(devices))
    host_model.settle()
    error = float((gradient(part, shape) - alone).norm() / alone.norm())
    add({"section": "correctness", "name": "gradient over two cards against one", "relative_error": error})
    for workers in (1, 2, 3):
        add(measure(part, shape, drivers, "7B, pipeline over two cards", 16 * workers, workers, seconds))
    del part
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                host_model.settle()
    at = time.monotonic()
    part = spread(build(large, devices), devices, [1.0] * len(devices))
    add({"section": "build", "name": "large", "seconds": time.monotonic() - at})
    for workers in (1, 2):
        add(measure(part, large, drivers, "larger than one card", 8 * workers, workers, 2 * seconds))
    one, two = (
        rows[0]["tokens_per_second"],
        max(row["tokens_per_second"] for row in rows if row["name"] == "7B, pipeline over two cards"),
    )
    add({"section": "summary", "name": "two cards against one", "ratio": two / one})
    print(f"done in {time.monotonic() - began:.0f} s", flush=True)
    return int(any(row.get("errors") for row in rows))


def main() -> int:
    """Run it; 0 if no client met an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models, for any machine")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measured load (%(default)s)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results file")
    options = parser.parse_args()
    if options.tiny and options.json == RESULTS:
        parser.error("--tiny measures nothing that belongs into the results: name another file with --json")
    if torch.cuda.device_count() < 2 and not options.tiny:
        print(
            f"two GPUs are needed, and torch sees {torch.cuda.device_count()}; --tiny runs the same code here"
        )
        return 2
    names = ["cpu", "cpu"] if torch.cuda.device_count() < 2 else ["cuda:0", "cuda:1"]
    shapes = (host_model.TINY, host_model.TINY) if options.tiny else (host_model.FULL, LARGE)
    with Drivers(2 if options.tiny else 8) as drivers, torch.no_grad():
        return work(*shapes, [torch.device(name) for name in names], drivers, options.seconds, options.json)


if __name__ == "__main__":
    sys.exit(main())
