"""Where adapters and losses use the project's Triton kernels instead of plain torch.

By default on CUDA tensors, where `fednano_kernels` can be imported. The variable ``FEDNANO_KERNELS`` decides otherwise:
``off`` never, ``on`` on every device (where there is no GPU, the kernels' torch references run).
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fednano.adapters.protocol import Site
from fednano.errors import ConfigError

__all__ = ["LowRank", "fused_low_rank", "kernels_for"]

_MODES = ("auto", "off", "on")


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        return importlib.import_module("fednano_kernels")
    except ImportError:
        return None


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The kernels, if operations on ``tensor`` should use them.

    Raises:
        ConfigError: ``FEDNANO_KERNELS`` is set to something else.
    """
    mode = os.environ.get("FEDNANO_KERNELS", "auto")
    if mode not in _MODES:
        raise ConfigError(f"FEDNANO_KERNELS is {mode!r}; expected one of {', '.join(_MODES)}.")
    if mode == "off" or tensor.dtype == torch.float64 or not tensor.numel():
        return None
    if mode == "auto" and not tensor.is_cuda:
        return None
    if torch._C._are_functorch_transforms_active():
        return None  # torch.func sees through plain torch only
    return _kernels()


@dataclass(frozen=True)
class LowRank:
    """A change ``x -> scale * B M act(A x)``.

    Attributes:
        a: ``(r, d_in)``.
        b: ``(d_out, r)``.
        scale: the factor before the change.
        activation: ``linear`` or ``gelu``.
        mix: M, ``(r, r)`` or its diagonal ``(r,)``; None for the identity.
    """

    a: Tensor
    b: Tensor
    scale: float
    activation: str = "linear"
    mix: Tensor | None = None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``z`` ``(..., r)`` and ``up`` ``(r, d_out)`` with ``z @ up`` the change of ``x`` ``(..., d_in)``."""
        z = x @ self.a.T
        if self.activation == "gelu":
            z = F.gelu(z)
        if self.mix is not None:
            z = z * self.mix if self.mix.dim() == 1 else z @ self.mix.T
        return z, self.scale * self.b.T


def fused_low_rank(
    kernels: ModuleType,
    site: Site,
    x: Tensor,
    base: Callable[[Tensor], Tensor] | None,
    form: LowRank,
) -> Tensor | None:
    """``base(x)`` plus the change in one kernel, or None where there is none for this site.

    Args:
        kernels: from `kernels_for`.
        site: the site.
        x: ``(..., d_in)``; the result has its dtype, to which the factors are brought. The kernels sum in float32.
        base: what `Adapter.forward` was given.
        form: the change.
    """
    if base is None or site.kind not in ("bridge", "linear"):
        return None
    a, b = form.a.to(x.dtype), form.b.to(x.dtype)
    mix = None if form.mix is None else form.mix.to(x.dtype)
    if site.kind == "bridge":
        if mix is not None:
            b = b * mix if mix.dim() == 1 else b @ mix
        fused: Tensor = kernels.nano_adapter(
            x, a.T.contiguous(), b.T.contiguous(), form.scale, form.activation
        )
        return fused
    if form.activation != "linear" or type(base) is not nn.Linear or base.weight.dtype != x.dtype:
        return None
    if mix is not None and mix.dim() == 2:
        mix = mix.T  # the kernel's M stands right of x: (x A^T) M B^T
    fused = kernels.lora_linear(x, base.weight.detach(), a, b, form.scale, mix, base.bias)
    return fused
