"""The language part that the host's benchmark serves: LLaVA-1.5-7B's shape with random weights, and passes over it."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fednano.models.language import LanguagePart, LocalLLM
from fednano.models.language_inputs import IGNORE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shape:
    """Sizes of one run of the benchmark.

    Attributes:
        config: of the decoder, for ``LlamaConfig``.
        vision: of the vision tower, for ``CLIPVisionConfig``.
        dtype: of weights and wire.
        lengths: short, middle and long samples, in tokens.
        image_tokens: of the long sample.
        clients: numbers of clients to measure.
        budget_gb: memory that a pass over 8 long samples shall keep within.
        rank: of the adapters.
    """

    config: dict[str, Any]
    vision: dict[str, Any]
    dtype: torch.dtype
    lengths: tuple[int, int, int]
    image_tokens: int
    clients: tuple[int, ...]
    budget_gb: float
    rank: int

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return int(self.config["hidden_size"])


# The sizes of llava-hf/llava-1.5-7b-hf: Vicuna-7B behind CLIP ViT-L/14 at 336 pixels.
FULL = Shape(
    config={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    },
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    dtype=torch.bfloat16,
    lengths=(64, 256, 700),
    image_tokens=576,
    clients=(1, 2, 4, 8, 16, 32, 64),
    budget_gb=26.0,
    rank=64,
)
TINY = Shape(
    config={
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 128,
    },
    vision={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    dtype=torch.float32,
    lengths=(8, 16, 24),
    image_tokens=16,
    clients=(1, 4),
    budget_gb=1.0,
    rank=4,
)


def build(shape: Shape) -> Any:
    """``LlamaForCausalLM`` of random weights on the device, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with DEVICE:
            model = LlamaForCausalLM(LlamaConfig(**shape.config, pad_token_id=0))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).eval()


def part_of(model: Any) -> LanguagePart:
    """The same model as a language part; a random model's name is its fingerprint."""
    config = model.config
    return LanguagePart(
        model.model,
        model.lm_head,
        config.hidden_size,
        config.vocab_size,
        config.max_position_embeddings,
        (2,),
        0,
        "random-weights",
    )


def useful_parameters(model: Any) -> int:
    """Parameters that every token passes through: all but the table of input embeddings."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - int(model.get_input_embeddings().weight.numel())


def inputs(shape: Shape, samples: int, length: int, answers: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch on the device, its mask and labels on the CPU."""
    embeds = torch.randn(samples, length, shape.width, device=DEVICE, dtype=shape.dtype)
    labels = torch.full((samples, length), IGNORE)
    labels[:, -min(answers, length - 1) :] = 7
    return embeds, torch.ones(samples, length, dtype=torch.bool), labels


def wait() -> None:
    """Until the device has done all."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def settle() -> None:
    """Let go of what is not used."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated() -> int:
    """Bytes of tensors on the device."""
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def peak_gb() -> float:
    """Most bytes of tensors on the device since `settle`, in 10^9."""
    return torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0


def timed(work: Any, *, seconds: float = 2.0) -> float:
    """Median seconds of a call, device included."""
    work()
    wait()
    spent: list[float] = []
    end = time.monotonic() + seconds
    while len(spent) < 3 or (time.monotonic() < end and len(spent) < 30):
        began = time.perf_counter()
        work()
        wait()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def eager_pass(model: Any, shape: Shape, samples: int, length: int, seconds: float = 2.0) -> dict[str, Any]:
    """Forward and backward to the embeddings by transformers alone: all logits, mean loss."""
    embeds, _, labels = inputs(shape, samples, length, length)
    targets = labels.to(DEVICE)
    settle()

    def work() -> None:
        x = embeds.detach().requires_grad_()
        loss = model(inputs_embeds=x, labels=targets, use_cache=False).loss
        torch.autograd.grad(loss, x)

    return row(model, "transformers, eager", samples, length, timed(work, seconds=seconds))


def host_pass(
    model: Any, llm: LocalLLM, shape: Shape, samples: int, length: int, name: str, seconds: float = 2.0
) -> dict[str, Any]:
    """The host's own pass over the same batch."""
    embeds, mask, labels = inputs(shape, samples, length, length)
    settle()

    def work() -> None:
        llm.passes.compute(embeds, mask, labels, "cross_entropy", True)

    return row(model, name, samples, length, timed(work, seconds=seconds))


def kernels_of(
    llm: LocalLLM, shape: Shape, samples: int, length: int, engine: str, most: int = 10
) -> list[dict[str, Any]]:
    """Where the GPU's time goes in one pass: its longest kernels, all others, and the whole pass under watch."""
    embeds, mask, labels = inputs(shape, samples, length, length)
    llm.passes.compute(embeds, mask, labels, "cross_entropy", True)
    wait()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watched:
        llm.passes.compute(embeds, mask, labels, "cross_entropy", True)
        wait()
    whole = time.perf_counter() - began
    found = sorted(watched.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    parts = [(kernel.key[:80], kernel.self_device_time_total / 1e3, kernel.count) for kernel in found]
    rest = parts[most:]
    parts = [*parts[:most], ("all others", sum(part[1] for part in rest), sum(part[2] for part in rest))]
    common = {"section": "kernels", "engine": engine, "samples": samples, "tokens": length}
    return [
        {**common, "kernel": name, "milliseconds": spent, "calls": calls}
        for name, spent, calls in (*parts, ("the pass, watched", 1e3 * whole, 1))
    ]


def row(model: Any, name: str, samples: int, length: int, seconds: float) -> dict[str, Any]:
    """One measured pass. Useful operations: 2 forward and 2 backward for each parameter and token."""
    return {
        "section": "pass",
        "name": name,
        "samples": samples,
        "tokens": length,
        "seconds": seconds,
        "samples_per_second": samples / seconds,
        "useful_tflops": 4 * useful_parameters(model) * samples * length / seconds / 1e12,
        "peak_gb": peak_gb(),
    }
