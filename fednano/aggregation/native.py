"""Whether sums in fixed point are added by compiled loops (`native_loops`) or by torch. The bits are the same.

The loops need numba, the extra ``native``. Loading it costs the better part of a second and some megabytes, the first
time on a machine also their compilation, while a small run merges for milliseconds in total. So a process starts with
torch and goes over to the loops once it has merged `AFTER` elements: by then torch has cost about as much more than the
loops as loading them costs, so however long the process goes on, it spends at most about that much more than the better
choice from the start would have. What comes out does not tell which updates went which way.

``FEDNANO_NATIVE`` decides otherwise: ``off`` never, ``on`` from the first update. Tensors on a device, of other dtypes
than float32 and float64, or not contiguous go through torch, and so does everything on a processor where torch rounds
in another way than the loops: each loop is compared with torch before its first use.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fednano.aggregation.chunks import U64
from fednano.errors import ConfigError

__all__ = ["AFTER", "Loop", "Vector", "agrees", "chosen", "loop_for", "vector"]

AFTER = 1 << 29  # elements, two gigabytes of float32

Loop = Callable[..., float]
Vector = npt.NDArray[np.float32 | np.float64]

_MODES = ("auto", "off", "on")
_KINDS = frozenset({torch.float32, torch.float64})
_PROBE = 4099  # values to compare on, of which some hundred tell one rounding from two
_TELLING = 67  # of those at the least, and not a whole number of vectors
_log = logging.getLogger(__name__)


class _Merged:
    """Elements that this process has merged by torch."""

    elements = 0


@functools.cache
def _loops() -> ModuleType | None:
    try:
        return importlib.import_module("fednano.aggregation.native_loops")
    except (ImportError, OSError):  # the latter from a shared library that cannot be loaded
        return None


def chosen(elements: int) -> bool:
    """Whether to ask `loop_for` for a term of so many elements, which count from now on.

    Raises:
        ConfigError: ``FEDNANO_NATIVE`` is not one of auto, off and on, or is "on" where there is no numba.
    """
    mode = os.environ.get("FEDNANO_NATIVE", "auto")
    if mode not in _MODES:
        raise ConfigError(f"FEDNANO_NATIVE is {mode!r}; expected one of {', '.join(_MODES)}.")
    if mode == "off":
        return False
    if mode == "auto" and _Merged.elements < AFTER:
        _Merged.elements += elements
        return False
    if _loops() is not None:
        return True
    if mode == "on":
        raise ConfigError(
            "FEDNANO_NATIVE is 'on', and numba cannot be imported: pip install 'fednano[native]', or set it to 'auto'."
        )
    return False


def vector(x: Tensor) -> Vector | None:
    """The memory of a tensor of any shape as a vector for the loops, or None where torch must do it."""
    if x.dtype not in _KINDS:
        return None
    try:
        array = x.detach().numpy() if x.requires_grad else x.numpy()
    except (TypeError, RuntimeError):  # on a device, or a view that is negated when it is read
        return None
    return array.reshape(-1) if array.flags.carray else None  # contiguous and aligned


def loop_for(name: str, *vectors: Vector) -> Loop | None:
    """The compiled loop for vectors of these dtypes, or None where torch must do it.

    Args:
        name: "add" or "add_pair".
        vectors: ``(n,)`` each; x and, for a pair, w.
    """
    return _checked(name, "".join([x.dtype.char for x in vectors]))


@functools.cache
def _checked(name: str, kinds: str) -> Loop | None:
    module = _loops()
    if module is None:
        return None
    try:
        loop: Loop = module.compiled(name, kinds)
    except Exception as error:  # a compiler fails in many ways, and no run should end by that
        _log.warning("the loops of merging cannot be compiled (%s): merging stays with torch", error)
        return None
    if agrees(loop, name, kinds):
        return loop
    _log.info("on this processor torch rounds otherwise than the compiled loops: merging stays with torch")
    return None


def agrees(loop: Loop, name: str, kinds: str) -> bool:
    """Whether a loop gives the words that torch gives, where rounding once and rounding twice differ.

    Args:
        loop: to be compared.
        name: "add" or "add_pair".
        kinds: "f" or "d" for each vector.
    """
    draw = np.random.default_rng(0)
    scaled, magic = 0.987654321 * 2.0**50.5, 1.5 * 2.0**52
    vectors = [draw.uniform(0.25, 1.0, _PROBE).astype(kind) for kind in kinds]
    product = scaled * vectors[0].astype(np.float64)
    if name == "add_pair":
        product *= vectors[1]
    apart = (product + magic).view(np.uint64)  # NumPy rounds the product by itself
    telling = np.flatnonzero(_words(loop, name, vectors, scaled)[0] != apart)[:_TELLING]
    if telling.size < _TELLING:
        return False
    some = [vector[telling] for vector in vectors]
    x, *weights = (torch.from_numpy(vector).double() for vector in some)
    base = torch.tensor(magic, dtype=torch.float64)
    expected = [torch.add(base, x, alpha=scaled)]
    if weights:
        expected = [
            torch.addcmul(base, x, weights[0], value=scaled),
            torch.add(base, weights[0], alpha=scaled),
        ]
    words = _words(loop, name, some, scaled)
    return all(
        np.array_equal(got, want.numpy().view(np.uint64)) for got, want in zip(words, expected, strict=True)
    )


def _words(loop: Loop, name: str, vectors: list[Vector], scaled: float) -> list[U64]:
    """What a loop adds to empty accumulators."""
    rings = [np.zeros(vectors[0].size, np.uint64) for _ in vectors]
    if name == "add":
        loop(rings[0], vectors[0], scaled, np.uint64(0))
    else:
        loop(*rings, *vectors, scaled, scaled, 0.0, 1.0, np.uint64(0))
    return rings
