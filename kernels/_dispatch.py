"""Where an operator runs, and the checks that come before every launch.

CUDA tensors go to Triton; float64, and every other device, to the plain torch reference. With ``TRITON_INTERPRET=1``
set before triton is imported, the same Triton code also runs on CPU tensors, in numpy: slow, and meant for tests.

Triton is imported only when a kernel is launched, so the package imports, and its references run, where it is absent.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("linear", "gelu")


class KernelArgumentError(ValueError):
    """An argument of a kernel has the wrong device, dtype, shape or value; nothing was launched."""


@functools.cache
def triton_installed() -> bool:
    """Whether the package triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(tensor: Tensor) -> bool:
    """Whether operators on this tensor's device run Triton code (else the torch reference)."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or torch._C._are_functorch_transforms_active():
        return False  # the references can be transformed by torch.func, kernels cannot
    if kind == "cuda":
        return triton_installed()
    return kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and triton_installed()


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler or a tracer is looking, which must see one operator instead of a Python function."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def require(condition: bool, message: str) -> None:
    """Raise ``KernelArgumentError(message)`` unless the condition holds."""
    if not condition:
        raise KernelArgumentError(message)


def check_tensor(
    name: str, tensor: Tensor, *, shape: tuple[int | None, ...] | None = None, like: Tensor | None = None
) -> None:
    """Check one floating-point argument.

    Args:
        name: how the message calls it.
        tensor: the argument.
        shape: expected sizes, None where any size is right.
        like: a tensor whose device and dtype the argument must share.

    Raises:
        KernelArgumentError: says what was got and what was expected.
    """
    if like is not None and tensor.device != like.device:
        raise KernelArgumentError(
            f"{name} is on {tensor.device}; expected {like.device}, as the other arguments"
        )
    if like is not None and tensor.dtype != like.dtype:
        raise KernelArgumentError(f"{name} is {tensor.dtype}; expected {like.dtype}: cast it first")
    if tensor.dtype not in FLOATS and tensor.dtype != torch.float64:
        raise KernelArgumentError(f"{name} is {tensor.dtype}; expected float32, bfloat16 or float16")
    if shape is not None and (
        tensor.dim() != len(shape)
        or any(e is not None and e != g for e, g in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise KernelArgumentError(f"{name} has shape {tuple(tensor.shape)}; expected ({wanted})")


def check_activation(activation: str) -> None:
    """Check the name of an activation."""
    if activation not in ACTIVATIONS:
        raise KernelArgumentError(f"activation is {activation!r}; expected one of {ACTIVATIONS}")


def as_rows(tensor: Tensor) -> Tensor:
    """View (or copy, where no view exists) ``(..., d)`` as ``(M, d)`` with unit stride along d."""
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)`` for non-negative integers."""
    return -(-a // b)
