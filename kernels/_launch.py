# mypy: allow-any-expr
"""Launching a Triton kernel again without paying for what does not change.

``kernel[grid](...)`` binds and specialises every argument anew. On a client's small batches that costs more than the
kernel itself. Here the compiled kernel of a first launch is kept under what Triton specialises on (constants, dtypes,
16-byte alignment of pointers, divisibility of integers) and is launched directly the next time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Argument = Tensor | int | float

_compiled: dict[tuple[object, ...], Any] = {}
_LIMIT = 4096  # a bound on what shapes that never repeat can fill


def launch(
    fn: Any, grid: tuple[int, ...], arguments: tuple[Argument, ...], constants: dict[str, Any], num_warps: int
) -> None:
    """Launch ``fn[grid](*arguments, **constants)`` on the current device and stream.

    Args:
        fn: a ``triton.jit`` function whose constexpr parameters come last, in the order of ``constants``.
        grid: one to three sizes.
        arguments: tensors (the first one decides the device), integers, floats.
        constants: the constexpr parameters, by name, in the order of the signature.
        num_warps: warps of a program.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.device.type != "cuda":
        fn[grid](*arguments, **constants, num_warps=num_warps)
        return
    parts: list[object] = [fn, first.device.index, num_warps, *constants.values()]
    for argument in arguments:
        if isinstance(argument, Tensor):
            parts.append(argument.dtype)
            parts.append(argument.data_ptr() & 15 == 0)
        elif isinstance(argument, int):
            parts.append((argument & 15 == 0) + 2 * (argument == 1) + 4 * (argument.bit_length() > 31))
    key = tuple(parts)
    kernel = _compiled.get(key)
    full = (*grid, 1, 1)[:3]
    if kernel is not None:
        if first.device.index == torch.cuda.current_device():
            kernel[full](*arguments, *constants.values())
        else:
            with torch.cuda.device(first.device):
                kernel[full](*arguments, *constants.values())
        return
    with torch.cuda.device(first.device):
        compiled = fn[grid](*arguments, **constants, num_warps=num_warps)
    if len(_compiled) >= _LIMIT:
        _compiled.clear()
    _compiled[key] = compiled
