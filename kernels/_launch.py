"""Launching a Triton kernel again without paying for what does not change.

``kernel[grid](...)`` binds, specialises and looks up every argument anew. On a client's small batches that costs more
than the kernel itself. A ``Plan`` is one launch with everything decided but the tensors and the numbers: after its
first launch it keeps the compiled kernel and calls that. Plans are kept by what they were decided from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _tuning

_LIMIT = 4096  # plans kept; a bound on what shapes that never repeat can fill
_plans: dict[tuple[object, ...], Plan] = {}


class Plan:
    """One launch of ``fn``; call it with the tensors and the floating-point numbers.

    The signature of ``fn`` is: tensors, integers, numbers, constexpr parameters. Triton specialises on the dtypes and
    the 16-byte alignment of tensors, on integers that are 1 or divisible by 16, and on the constants. The integers and
    constants are part of the plan, dtypes must be part of what it is kept by, and tensors that are not aligned take
    the slow way.
    """

    __slots__ = ("constants", "device", "fn", "grid", "integers", "num_warps", "runner", "values")

    def __init__(
        self,
        fn: Any,
        grid: tuple[int, ...],
        integers: tuple[int, ...],
        constants: dict[str, Any],
        num_warps: int,
    ) -> None:
        self.fn, self.grid, self.integers, self.constants, self.num_warps = (
            fn,
            grid,
            integers,
            constants,
            num_warps,
        )
        self.values = tuple(constants.values())
        self.runner: Callable[..., None] | None = None
        self.device = -1

    def __call__(self, tensors: tuple[Tensor, ...], numbers: tuple[float, ...] = ()) -> None:
        """Launch on the device of the tensors and its current stream."""
        bits = 0
        for tensor in tensors:
            bits |= tensor.data_ptr()
        runner = self.runner
        if runner is not None and not bits & 15 and torch.cuda.current_device() == self.device:
            runner(*tensors, *self.integers, *numbers, *self.values)
            return
        arguments = (*tensors, *self.integers, *numbers)
        device = tensors[0].device
        if device.type != "cuda":
            self.fn[self.grid](*arguments, **self.constants, num_warps=self.num_warps)
            return
        with torch.cuda.device(device):
            compiled = self.fn[self.grid](*arguments, **self.constants, num_warps=self.num_warps)
        if not bits & 15:
            self.runner, self.device = compiled[(*self.grid, 1, 1)[:3]], device.index


def plan(key: tuple[object, ...], build: Callable[[], Plan]) -> Plan:
    """The plan kept under ``key``, built if there is none.

    Args:
        key: the kernel's name, and everything ``build`` depends on: shapes, strides, dtypes, device, options.
        build: makes the plan.
    """
    full = (_tuning.version(), *key)
    found = _plans.get(full)
    if found is None:
        if len(_plans) >= _LIMIT:
            _plans.clear()
        found = _plans[full] = build()
    return found


def launch(
    fn: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], integers: tuple[int, ...], numbers: tuple[float, ...],
    constants: dict[str, Any], num_warps: int,
) -> None:  # fmt: skip
    """One launch, its plan kept by the arguments themselves; for kernels that are not launched every step."""
    key = (
        id(fn), grid, integers, *constants.values(), num_warps, tensors[0].device, *[t.dtype for t in tensors],
    )  # fmt: skip
    plan(key, lambda: Plan(fn, grid, integers, constants, num_warps))(tensors, numbers)
