"""A host's model, as its options ask for it: loaded, placed on its devices, ready to compute."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

import torch

from fednano.errors import ConfigError
from fednano.host.kept import KeptSamples
from fednano.models.language import LanguagePart, LocalLLM
from fednano.models.memory import PipelineMemory

__all__ = [
    "LINGER_SECONDS",
    "Loader",
    "batch_tokens",
    "kept_samples",
    "linger_seconds",
    "load_part",
    "make_model",
]

LINGER_SECONDS = 0.03
"""Of a host on a GPU, by default; on a CPU nothing is held back."""

Loader: TypeAlias = Callable[[str, str, str], LanguagePart]
"""Loads the language part from a model's name, a dtype's name and a device."""


def load_part(options: argparse.Namespace, load: Loader | None = None) -> LanguagePart:
    """The language part on its devices.

    Args:
        options: of the command line.
        load: loads the model onto one device; ``None`` takes `fednano.models.load.load_language`.

    Raises:
        ConfigError: options that do not go together.
        ModelError: the model cannot be loaded or divided.
    """
    load = load or _load
    dtype = options.dtype
    if options.weights == "bf16":
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"--weights bf16 and --dtype {dtype} exclude each other: leave one out")
        dtype = "bfloat16"
    elif options.weights:
        from fednano.models.quantise import quantise

        if options.device_map:
            raise ConfigError(
                f"--weights {options.weights} goes with one device: leave out --device-map, or --weights"
            )
        return quantise(load(options.model, dtype, "cpu"), options.weights, torch.device(options.device))
    if not options.device_map:
        return load(options.model, dtype, options.device)
    from fednano.models.placing import parse_device_map, spread

    if options.device != "cpu":
        raise ConfigError("--device and --device-map exclude each other: leave --device out")
    if options.compile:
        raise ConfigError("--compile goes with one device: leave out --device-map, or --compile")
    devices, shares = parse_device_map(options.device_map)
    return spread(load(options.model, dtype, "cpu"), devices, shares)


def make_model(options: argparse.Namespace, part: LanguagePart) -> LocalLLM:
    """The model, ready to compute: a host that says it serves answers its first step as fast as its hundredth.

    Raises:
        ConfigError: a memory limit without a GPU, CUDA graphs without exactly one.
    """
    gpu, memory = _on_gpu(part), None
    if options.cuda_graphs and options.batch_tokens == 0:
        raise ConfigError(
            "--batch-tokens 0 promises bits that depend on the request alone, and with --cuda-graphs they depend on "
            "what came before: leave one out"
        )
    if options.memory_gb is not None and (not gpu or not options.memory_gb > 0):
        raise ConfigError(
            f"--memory-gb: got {options.memory_gb:g} on {part.devices[0]}; expected a number above 0, on a GPU"
        )
    if gpu:
        limit = None if options.memory_gb is None else int(options.memory_gb * 1e9)
        memory = PipelineMemory(part.devices, limit, passes=options.workers)
    llm = LocalLLM(part, compiled=options.compile, memory=memory, graphs=options.cuda_graphs)
    if options.compile or gpu:
        llm.passes.warm_up()
    else:
        llm.passes.first()
    return llm


def batch_tokens(options: argparse.Namespace, part: LanguagePart) -> int:
    """What was asked, or a default for the device: on a CPU the passes of small batches gain nothing."""
    if options.batch_tokens is not None:
        return int(options.batch_tokens)
    return 8192 if _on_gpu(part) else 0


def kept_samples(options: argparse.Namespace, part: LanguagePart) -> KeptSamples:
    """Where samples of the factored exchange are kept.

    Raises:
        ConfigError: a negative number, or a place on a GPU that the model does not have.
    """
    if options.keep_gpu_bytes and not _on_gpu(part):
        raise ConfigError("--keep-gpu-bytes: the model lies on no GPU; leave it out, or add --device cuda")
    return KeptSamples(options.keep_bytes, options.keep_disk_bytes, options.keep_gpu_bytes)


def linger_seconds(options: argparse.Namespace, part: LanguagePart) -> float:
    """Likewise, in seconds."""
    if options.linger_ms is not None:
        return float(options.linger_ms) / 1000
    return LINGER_SECONDS if _on_gpu(part) else 0.0


def _on_gpu(part: LanguagePart) -> bool:
    return part.devices[0].type == "cuda"


def _load(name: str, dtype: str, device: str) -> LanguagePart:
    from fednano.models.load import load_language

    return load_language(name, dtype=getattr(torch, dtype), device=device)
