"""One matrix, four kinds of sites: how a ``(d_out, d_in)`` map acts at a linear, conv2d, embedding or
bridge site."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fednano.adapters.protocol import Site
from fednano.errors import ModelError

__all__ = ["apply", "check_input", "check_weight", "flat", "low_rank", "native", "second", "splits"]


def flat(site: Site, weight: Tensor) -> Tensor:
    """View a module's weight as ``(d_out, d_in)``; an embedding's table is transposed."""
    if site.kind == "embedding":
        return weight.T
    return weight.reshape(site.d_out, site.d_in)


def native(site: Site, matrix: Tensor) -> Tensor:
    """View ``(d_out, d_in)`` in the layout of the site's module."""
    if site.kind == "embedding":
        return matrix.T
    if site.kind == "conv2d":
        return matrix.reshape(site.d_out, -1, *site.kernel)
    return matrix


def splits(site: Site) -> bool:
    """Whether a product B A may be applied factor by factor (a grouped convolution has no common first
    factor)."""
    return site.groups == 1


def apply(site: Site, x: Tensor, matrix: Tensor) -> Tensor:
    """Apply ``matrix`` ``(m, d_in)`` to the site's input.

    Args:
        site: the site.
        x: ``(..., d_in)``; conv2d: ``(N, C, H, W)`` or ``(C, H, W)``; embedding: ids ``(...)`` int64.
        matrix: ``(m, d_in)``; a grouped convolution needs ``m == d_out``.

    Returns:
        ``(..., m)``; conv2d: ``(N, m, H', W')``.
    """
    if site.kind == "embedding":
        return F.embedding(x, matrix.T)
    if site.kind == "conv2d":
        kernel = matrix.reshape(matrix.shape[0], -1, *site.kernel)
        return F.conv2d(
            x, kernel, stride=site.stride, padding=site.padding, dilation=site.dilation, groups=site.groups
        )
    return F.linear(x, matrix)


def low_rank(site: Site, x: Tensor, A: Tensor, B: Tensor, M: Tensor | None = None) -> Tensor:
    """Apply ``B M A`` without forming it: ``x`` to ``x A^T``, then the small ``M``, then ``B``.

    Args:
        site: the site.
        x: see `apply`.
        A: ``(r, d_in)``.
        B: ``(d_out, r)``.
        M: ``(r, r)``, a diagonal ``(r,)``, or None for the identity.
    """
    if not splits(site):
        middle = A if M is None else (M[:, None] * A if M.dim() == 1 else M @ A)
        return apply(site, x, B @ middle)
    if M is not None:  # fold M into the smaller side: B M costs d_out r^2 once, not tokens r^2
        B = B * M if M.dim() == 1 else B @ M
    return second(site, apply(site, x, A), B)


def second(site: Site, z: Tensor, B: Tensor) -> Tensor:
    """Apply a second factor ``B`` ``(d_out, r)`` to what a first one gave: ``(..., r)``, conv2d ``(N, r, H', W')``."""
    return F.conv2d(z, B[:, :, None, None]) if site.kind == "conv2d" else F.linear(z, B)


def check_input(site: Site, x: Tensor) -> None:
    """Raise ModelError if ``x`` cannot be an input of the site; empty batches and any strides are fine."""
    if site.kind == "embedding":
        if x.is_floating_point():
            raise ModelError(
                f"embedding site {site.name!r}: got {x.dtype} input; expected integer ids, not embedded "
                "tokens"
            )
    elif site.kind == "conv2d":
        channels = site.d_in // (site.kernel[0] * site.kernel[1]) * site.groups
        if x.dim() not in (3, 4) or x.shape[-3] != channels:
            raise ModelError(
                f"conv2d site {site.name!r}: got input of shape {tuple(x.shape)}; expected (N, "
                f"{channels}, H, W)"
            )
    elif x.dim() < 1 or x.shape[-1] != site.d_in:
        raise ModelError(
            f"site {site.name!r}: got input of shape {tuple(x.shape)}; expected (..., {site.d_in})"
        )


def check_weight(site: Site, weight: Tensor) -> None:
    """Raise ModelError if a weight is sharded, quantised, not materialised, or of another shape than the
    site's.

    Args:
        site: the site.
        weight: the module's own weight, in its native layout.
    """
    expected = {
        "embedding": (site.d_in, site.d_out),
        "conv2d": (site.d_out, site.d_in // (site.kernel[0] * site.kernel[1]), *site.kernel),
    }.get(site.kind, (site.d_out, site.d_in))
    kind = type(weight).__name__
    if kind == "DTensor" or hasattr(weight, "ds_shape") or (weight.numel() == 0 and expected[0] > 0):
        raise ModelError(
            f"site {site.name!r}: its weight is sharded ({kind} of local shape {tuple(weight.shape)}, "
            f"full shape {expected}); "
            "gather the full weight before attaching an adapter"
        )
    if weight.is_meta:
        raise ModelError(
            f"site {site.name!r}: its weight is on the meta device; load the model's weights first"
        )
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise ModelError(
            f"site {site.name!r}: its weight is quantised ({weight.dtype}, shape {tuple(weight.shape)}); "
            "adapters need a bf16, fp16, fp32 or fp64 weight: load the model unquantised"
        )
    if tuple(weight.shape) != expected:
        raise ModelError(
            f"site {site.name!r}: got a weight of shape {tuple(weight.shape)}; expected {expected}"
        )


def frozen_copy(value: Tensor) -> nn.Parameter:
    """Wrap a tensor as a parameter that takes no gradient."""
    return nn.Parameter(value.contiguous(), requires_grad=False)


def as_float64(weight: Tensor) -> Tensor:
    """Copy of a weight on the CPU in float64: the precision in which bases are computed."""
    return weight.detach().to(device="cpu", dtype=torch.float64)
