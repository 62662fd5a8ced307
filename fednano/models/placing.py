"""Lay a language part over several devices: whole blocks on each, in order, as a pipeline.

A batch passes from device to device, and so does its gradient on the way back. With several workers a host has several
batches under way, each on another device. Hooks of accelerate move what crosses from one device to the next; the cut
is made here, because a frozen decoder wants equal shares of its blocks rather than one full device after the other:
activations, too, are then shared equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fednano.errors import ConfigError, ModelError
from fednano.models.blocks import repeated_blocks, stand_aside
from fednano.models.language import LanguagePart

__all__ = ["block_devices", "lay_out_devices", "parse_device_map", "spread"]


def parse_device_map(text: str) -> tuple[list[torch.device], list[float]]:
    """The devices that a user named, and the share of the blocks that each takes.

    Args:
        text: ``"balanced"`` (all GPUs, equal shares), ``"auto"`` (all GPUs, shares as their free memory), or devices
            with commas between them, such as ``"cuda:0,cuda:1"`` (equal shares).

    Raises:
        ConfigError: no GPU, or not a device of this machine.
    """
    if text in ("auto", "balanced"):
        count = torch.cuda.device_count()
        if count == 0:
            raise ConfigError(
                f"device-map: got {text!r}, and torch sees no GPU here; name devices, such as cuda:0,cuda:1"
            )
        devices = [torch.device("cuda", index) for index in range(count)]
        if text == "balanced":
            return devices, [1.0] * count
        return devices, [float(torch.cuda.mem_get_info(device)[0]) for device in devices]
    try:
        devices = [torch.device(name.strip()) for name in text.split(",")]
    except RuntimeError as error:
        raise ConfigError(
            f"device-map: got {text!r}, expected 'auto', 'balanced', or devices such as cuda:0,cuda:1"
        ) from error
    for device in devices:
        there = torch.cuda.device_count()
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
            raise ConfigError(f"device-map: got {device}, and torch sees {there} GPUs here (cuda:0 to ...)")
    return devices, [1.0] * len(devices)


def lay_out_devices(blocks: int, shares: Sequence[float]) -> list[int]:
    """Which device each block goes to, as an index: consecutive blocks, in proportion to ``shares``.

    Raises:
        ConfigError: fewer blocks than devices.
    """
    if blocks < len(shares):
        raise ConfigError(
            f"device-map: the model has {blocks} blocks, too few for {len(shares)} devices; name fewer devices"
        )
    counts = [1] * len(shares)  # every device gets one
    for _ in range(blocks - len(shares)):
        lacking = [blocks * share / sum(shares) - count for share, count in zip(shares, counts, strict=True)]
        counts[lacking.index(max(lacking))] += 1
    return [device for device, count in enumerate(counts) for _ in range(count)]


def block_devices(
    decoder: nn.Module, devices: Sequence[torch.device], shares: Sequence[float]
) -> dict[str, torch.device]:
    """Module names of a decoder and the device of each: a device map as accelerate wants it.

    What stands before the blocks, and what has no weights, goes to the first device; what stands behind, to the last.

    Raises:
        ModelError: the decoder has no repeated blocks.
    """
    blocks = repeated_blocks(decoder)
    if not blocks:
        raise ModelError(f"{type(decoder).__name__} has no repeated blocks to lay over several devices")
    names = {id(module): name for name, module in decoder.named_modules()}
    found = {
        names[id(block)]: devices[index]
        for block, index in zip(blocks, lay_out_devices(len(blocks), shares), strict=True)
    }
    path = names[id(blocks[0])].rpartition(".")[0]
    parent, behind = decoder, False
    for step in path.split("."):
        prefix, behind = names[id(parent)], False
        for name, child in parent.named_children():
            if name == step:
                behind = True
                continue
            weights = any(True for _ in child.parameters())
            found[f"{prefix}.{name}" if prefix else name] = devices[-1 if behind and weights else 0]
        parent = parent.get_submodule(step)
    return found


def spread(part: LanguagePart, devices: Sequence[torch.device], shares: Sequence[float]) -> LanguagePart:
    """Move a language part onto several devices; its head goes to the last. Changes the modules in place.

    Args:
        part: with its weights on any device.
        devices: in the order of the pipeline.
        shares: of each, see `lay_out_devices`.

    Raises:
        ConfigError: accelerate is not installed, or there are more devices than blocks.
        ModelError: the decoder has no repeated blocks.
    """
    try:
        from accelerate import dispatch_model
    except ImportError as error:
        raise ConfigError(
            "a model over several devices needs the package accelerate: pip install 'fednano[multi-gpu]'"
        ) from error
    places = block_devices(part.decoder, devices, shares)
    stand_aside(part.decoder)
    skip: Any = getattr(part.decoder, "_skip_keys_device_placement", None)  # a cache lies where its blocks do
    with torch.no_grad():
        # Hooks even where all devices are one: then it is the same program that runs.
        dispatch_model(
            part.decoder,
            {name: str(device) for name, device in places.items()},
            main_device=str(devices[0]),
            skip_keys=skip,
            force_hooks=True,
        )
    part.head.to(devices[-1])
    return part
