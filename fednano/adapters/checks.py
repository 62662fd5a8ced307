"""What arrives from elsewhere is checked here: leaves, shipped bases, and the fingerprints that tie them together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from fednano.adapters.protocol import Adapter, Leaf, Site, Tensors
from fednano.errors import ModelError

__all__ = ["check_leaf", "checked_basis", "fingerprint_of"]


def fingerprint_of(adapter: Adapter, site: Site, basis: Mapping[str, Tensor]) -> str:
    """Hex sha256 of adapter spec, site, and basis bytes (floats as float32, integers as int64, little
    endian)."""
    digest = hashlib.sha256(adapter.spec.encode())
    digest.update(
        f"|{site.name}|{site.kind}|{site.d_out}x{site.d_in}|{site.kernel}|{site.group_size}".encode()
    )
    for name in sorted(basis):
        value = basis[name].detach().cpu()
        value = value.to(torch.float32 if value.is_floating_point() else torch.int64).contiguous()
        digest.update(f"|{name}|{tuple(value.shape)}|".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def check_leaf(site: Site, name: str, leaf: Leaf, value: Tensor) -> None:
    """Raise ModelError unless ``value`` has the leaf's shape and finite floating-point numbers."""
    where = f"site {site.name!r}, leaf {name!r}"
    if tuple(value.shape) != leaf.shape or not value.is_floating_point():
        raise ModelError(
            f"{where}: got shape {tuple(value.shape)}, {value.dtype}; expected {leaf.shape}, floating point. "
            "The leaves belong to another model or rank"
        )
    _require_finite(where, value)


def checked_basis(adapter: Adapter, site: Site, basis: Mapping[str, Tensor]) -> Tensors:
    """Return copies of shipped frozen leaves.

    Args:
        adapter: the parametrisation.
        site: where it sits.
        basis: what arrived.

    Raises:
        ModelError: wrong names, shapes or dtypes (half precision would lose bits), or numbers that are not finite.
    """
    expected = adapter.frozen(site)
    if set(basis) != set(expected):
        raise ModelError(
            f"site {site.name!r}: got basis leaves {sorted(basis)}; expected {sorted(expected)} for adapter "
            f"{adapter.spec}"
        )
    for name, leaf in expected.items():
        value = basis[name]
        where = f"site {site.name!r}, basis leaf {name!r}"
        if tuple(value.shape) != leaf.shape:
            raise ModelError(
                f"{where}: got shape {tuple(value.shape)}; expected {leaf.shape}. The basis belongs to another "
                "model or rank"
            )
        floating = value.is_floating_point()
        if floating != leaf.dtype.is_floating_point or (floating and value.dtype.itemsize < 4):
            raise ModelError(
                f"{where}: got {value.dtype}; expected {leaf.dtype}. A basis must keep every bit: ship it without "
                "casting"
            )
        _require_finite(where, value)
    return {name: value.detach().clone() for name, value in basis.items()}


def _require_finite(where: str, value: Tensor) -> None:
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ModelError(
            f"{where}: {bad} of {value.numel()} numbers are NaN or Inf; expected finite numbers only"
        )
