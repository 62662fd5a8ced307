"""Named, independent random streams: the same names give the same numbers on every machine."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["generator", "stream_seed"]


def stream_seed(*names: object) -> int:
    """A 63-bit seed from any names, such as ``stream_seed(run_seed, "round", 3, "client", "a")``."""
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*names: object) -> np.random.Generator:
    """NumPy's counter-based Philox generator, keyed by names."""
    return np.random.Generator(np.random.Philox(stream_seed(*names)))
