"""Block sizes: a checked-in table for cards that were measured, a heuristic for every other.

``tuning.json`` maps card name -> kernel -> key -> config. A card that is not in the table borrows the rows of a card of
the same compute capability, and where there is none, or no row for the key, the kernel's own heuristic decides. A
card's name never leads to an error. ``fednano bench kernels --tune`` rewrites the rows of the card it runs on.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tuning.json")

Config = dict[str, int]

_forced: dict[str, Config] = {}
asked: dict[str, set[str]] = {}  # kernel -> keys of its launches under `forced`: the rows a tuner is to write


@functools.cache
def load_table() -> dict[str, Any]:
    """The table as checked in; empty where the file is absent."""
    if not TABLE.exists():
        return {}
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def bucket(n: int) -> int:
    """Sizes between powers of two share the row of the next one, up to 2^20."""
    return min(1 << max(n - 1, 0).bit_length(), 1 << 20)


@functools.cache
def _rows(device_index: int, kernel: str) -> Mapping[str, Config]:
    table = load_table()
    name = torch.cuda.get_device_name(device_index)
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device_index))
    cards = [card for card in table if card == name]
    cards += [card for card in table if table[card].get("capability") == capability and card not in cards]
    for card in cards:
        if kernel in table[card]["kernels"]:
            rows: Mapping[str, Config] = table[card]["kernels"][kernel]
            return rows
    return {}


def choose(kernel: str, device: torch.device, key: str, heuristic: Config) -> Config:
    """The config of one launch.

    Args:
        kernel: name in the table.
        device: where it runs; anything but CUDA takes the heuristic.
        key: the row, made of bucketed sizes.
        heuristic: what to use when the table has no such row.
    """
    if kernel in _forced:
        asked.setdefault(kernel, set()).add(key)
        return {**heuristic, **_forced[kernel]}
    if device.type != "cuda":
        return heuristic
    row = _rows(device.index if device.index is not None else torch.cuda.current_device(), kernel).get(key)
    return heuristic if row is None else {**heuristic, **row}


_version = [0]


def version() -> int:
    """A number that changes whenever configs may have changed."""
    return _version[0]


def reload() -> None:
    """Read the table again, after a tuner wrote it."""
    _version[0] += 1
    load_table.cache_clear()
    _rows.cache_clear()


@contextlib.contextmanager
def forced(**configs: Config) -> Iterator[None]:
    """Use these configs, by kernel, whatever the table says (the tuner's hook, also for tests)."""
    before = dict(_forced)
    _version[0] += 1
    _forced.update(configs)
    try:
        yield
    finally:
        _version[0] += 1
        _forced.clear()
        _forced.update(before)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
