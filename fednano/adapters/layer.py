"""The one module that carries any adapter at any site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fednano.adapters import checks, sites
from fednano.adapters.fused import LowRank
from fednano.adapters.method import Method
from fednano.adapters.protocol import Adapter, Basis, Leaf, Site, Tensors
from fednano.errors import ModelError, UpdateRefused

__all__ = ["AdapterLayer"]


class AdapterLayer(nn.Module):
    """``base(x) + path(x)`` with a frozen base; at a bridge ``x + path(x)``.

    Args:
        adapter: the parametrisation.
        site: where it sits.
        seed: the run's seed; with the site's name it fixes every random number here.
        weight: the base weight in its native layout, where there is no ``base`` module; ``(d_out, d_in)``
            for linear sites.
        base: the frozen module; None at bridges and for layers that stand alone (then the base term is
            ``weight``'s, or absent).
        stats: statistics of the site for adapters with ``Basis.STATS``, such as ``{"gradient": (d_out,
            d_in)}``.
        basis: a shipped basis, used instead of computing one; see `load_basis`.
        shared: parameters that other layers of the same group own too, by leaf name.

    Attributes:
        theta: trainable leaves by name.

    Raises:
        ConfigError: the adapter's rank or options do not fit the site.
        ModelError: the site's kind is not supported, or the weight is sharded, quantised or missing.
    """

    alone: Tensor | None
    merged_weight: Tensor | None

    def __init__(
        self,
        adapter: Adapter,
        site: Site,
        *,
        seed: int,
        weight: Tensor | None = None,
        base: nn.Module | None = None,
        stats: Mapping[str, Tensor] | None = None,
        basis: Mapping[str, Tensor] | None = None,
        shared: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        adapter.leaves(site)  # raises before anything is allocated
        if base is not None and site.kind == "bridge":
            raise ModelError(f"bridge site {site.name!r} takes no base module; got {type(base).__name__}")
        self.adapter, self.site, self.seed = adapter, site, seed
        self.base = base
        self.register_buffer("alone", None if base is not None else weight, persistent=False)
        self._saved: nn.Parameter | None = None
        self.register_buffer("merged_weight", None, persistent=False)
        own = self._native_weight()
        if own is not None:
            sites.check_weight(site, own)
        if base is not None:
            self._was_trainable = [parameter.requires_grad for parameter in base.parameters()]
            base.requires_grad_(False)
        self._basis_names: list[str] = []
        self._derived_names: list[str] = []
        source = None if own is None else sites.as_float64(sites.flat(site, own))
        if basis is None:
            self._set_basis(adapter.freeze(site, source, seed, stats))
        else:
            self._set_basis(checks.checked_basis(adapter, site, basis))
        start = adapter.start(site, seed, self.export_basis(everything=True), source)
        self.theta = nn.ParameterDict(
            {name: (shared or {}).get(name, nn.Parameter(value)) for name, value in start.items()}
        )
        if own is not None:
            self._move(own.device)

    # -- tensors ---------------------------------------------------------------------------------------------

    def _native_weight(self) -> Tensor | None:
        if self.base is not None:
            return getattr(self.base, "weight", None)
        return self.alone

    def _flat_weight(self) -> Tensor | None:
        own = self._native_weight() if self._saved is None else self._saved
        return None if own is None else sites.flat(self.site, own)

    def _move(self, device: torch.device) -> None:
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                self._buffers[name] = buffer.to(device)
        for parameter in self.theta.values():
            parameter.data = parameter.data.to(device)

    @property
    def weight(self) -> Tensor | None:
        """The base module's weight, for code that asks a layer for it."""
        return self._native_weight()

    @property
    def bias(self) -> Tensor | None:
        """The base module's bias, or None."""
        return None if self.base is None else getattr(self.base, "bias", None)

    @property
    def basis(self) -> Tensors:
        """Frozen leaves by name."""
        return {name: getattr(self, f"basis_{name}") for name in self._basis_names}

    def _tables(self) -> Tensors:
        return {
            **{name: getattr(self, f"basis_{name}") for name in self._basis_names},
            **{name: getattr(self, f"derived_{name}") for name in self._derived_names},
        }

    def _set_basis(self, basis: Tensors) -> None:
        for name in self._basis_names:
            delattr(self, f"basis_{name}")
        for name in self._derived_names:
            delattr(self, f"derived_{name}")
        # Contiguous: a shipped copy is, and other strides would mean other last bits of the same product.
        basis = {name: value.contiguous() for name, value in basis.items()}
        derived = {name: value.contiguous() for name, value in self.adapter.derive(self.site, basis).items()}
        self._basis_names, self._derived_names = sorted(basis), sorted(derived)
        keep = self.adapter.basis in (Basis.WEIGHT, Basis.STATS)
        for name in self._basis_names:
            self.register_buffer(f"basis_{name}", basis[name], persistent=keep)
        for name in self._derived_names:
            self.register_buffer(f"derived_{name}", derived[name], persistent=False)

    def leaves(self) -> dict[str, Leaf]:
        """Metadata of the trainable leaves."""
        return self.adapter.leaves(self.site)

    # -- forward ---------------------------------------------------------------------------------------------

    def _base(self) -> Callable[[Tensor], Tensor] | None:
        if self.base is not None:
            return self.base
        if self.site.kind == "bridge":
            return _identity
        return None if self.alone is None else partial(_apply_weight, self.site, self.alone)

    def functional(self, theta: Tensors, x: Tensor) -> Tensor:
        """Pure form of `forward`, for torch.func: the same output from explicitly given leaves.

        Args:
            theta: trainable leaves by name.
            x: see `forward`.
        """
        tables, weight = self._tables(), self._flat_weight()
        if not self.adapter.replaces_base:
            return self.adapter.forward(
                self.site, x, self._base(), theta, tables, weight=weight, training=self.training
            )
        out = self.adapter.forward(self.site, x, None, theta, tables, weight=weight, training=self.training)
        bias = self.bias
        if bias is None:
            return out
        return out + (bias[:, None, None] if self.site.kind == "conv2d" else bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            x: ``(..., d_in)``; conv2d ``(N, C, H, W)``; embedding ids ``(...)``.
        """
        sites.check_input(self.site, x)
        if self.merged_weight is not None:
            return _apply_weight(self.site, self.merged_weight, x)
        if self._saved is not None and self.base is not None:
            out: Tensor = self.base(x)
            return out
        return self.functional(dict(self.theta.items()), x)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What the layer adds to ``x`` ``(N, d_in)`` at a bridge or linear site as ``z @ up``: ``(N, r)`` and
        ``(r, d_out)``; ``None`` where it has no such form, or drops inputs at random."""
        drops = self.training and getattr(self.adapter, "dropout", 0) > 0
        if self.merged or self.adapter.replaces_base or drops:
            return None
        return self.adapter.low_rank(self.site, x, dict(self.theta.items()), self._tables())

    def low_rank_form(self) -> LowRank | None:
        """What the layer adds, as a product of two factors, its own leaves among them; None where it has no such form,
        or drops inputs at random."""
        drops = self.training and getattr(self.adapter, "dropout", 0) > 0
        if self.merged or self.adapter.replaces_base or drops or not isinstance(self.adapter, Method):
            return None
        return self.adapter.low_rank_form(dict(self.theta.items()), self._tables())

    def delta(self) -> Tensor:
        """The change ``(d_out, d_in)`` in the leaves' dtype.

        Raises:
            ModelError: the adapter's change is not one matrix.
        """
        return self.adapter.delta(self.site, dict(self.theta.items()), self._tables(), self._flat_weight())

    # -- what travels ----------------------------------------------------------------------------------------

    def travelling(self) -> Tensors:
        """Detached copies of the shared leaves."""
        return {
            name: self.theta[name].detach().clone()
            for name, leaf in self.leaves().items()
            if leaf.role == "shared"
        }

    def load_travelling(self, leaves: Mapping[str, Tensor]) -> None:
        """Copy shared leaves in.

        Args:
            leaves: exactly the leaves of `travelling`, same names and shapes.

        Raises:
            ModelError: a leaf is missing, unknown, of another shape, or not finite.
        """
        shared = {name: leaf for name, leaf in self.leaves().items() if leaf.role == "shared"}
        if set(leaves) != set(shared):
            raise ModelError(
                f"site {self.site.name!r}: got leaves {sorted(leaves)}; expected {sorted(shared)} of "
                f"adapter {self.adapter.spec}"
            )
        for name, value in leaves.items():
            self.check_leaf(name, value)
        with torch.no_grad():
            for name, value in leaves.items():
                self.theta[name].copy_(value)

    def check_leaf(self, name: str, value: Tensor) -> None:
        """Raise ModelError unless ``value`` has the leaf's shape and finite floating-point numbers."""
        checks.check_leaf(self.site, name, self.leaves()[name], value)

    def parameter_count(self) -> int:
        """Number of trainable numbers, shared and personal, from metadata."""
        return sum(leaf.numel for leaf in self.leaves().values())

    def uplink_bytes(self) -> int:
        """Bytes of one update, from metadata."""
        return sum(leaf.nbytes for leaf in self.leaves().values() if leaf.role == "shared")

    # -- basis -----------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hex sha256 of the adapter's spec, the site and the basis bytes."""
        return checks.fingerprint_of(self.adapter, self.site, self.basis)

    def require_fingerprint(self, got: str) -> None:
        """Raise UpdateRefused unless ``got`` is this layer's fingerprint."""
        mine = self.fingerprint()
        if got != mine:
            raise UpdateRefused(
                f"site {self.site.name!r}: the update was trained on basis {got}, this model has basis "
                f"{mine}; "
                "fetch the server's basis and train again"
            )

    def export_basis(self, *, everything: bool = False) -> Tensors:
        """Copies of the frozen leaves that must be shipped: none for seeded bases unless ``everything``."""
        if not everything and self.adapter.basis in (Basis.NONE, Basis.SEED):
            return {}
        return {name: value.detach().cpu().clone() for name, value in self.basis.items()}

    def load_basis(self, basis: Mapping[str, Tensor], fingerprint: str | None = None) -> None:
        """Replace the frozen leaves by shipped ones.

        Args:
            basis: exactly the leaves of ``frozen``, in float32 or int64.
            fingerprint: what the sender computed; checked if given.

        Raises:
            ModelError: wrong names, shapes, dtypes, non-finite values, or another fingerprint than
                promised (both are named).
        """
        checked = checks.checked_basis(self.adapter, self.site, basis)
        got = checks.fingerprint_of(self.adapter, self.site, checked)
        if fingerprint is not None and got != fingerprint:
            raise ModelError(
                f"site {self.site.name!r}: the shipped basis has fingerprint {got}, expected {fingerprint}; "
                "it was changed on the way or made for another adapter"
            )
        device = next(iter(self.theta.values())).device
        self._set_basis(checked)
        self._move(device)

    # -- merge -----------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the change is folded into the weight at present."""
        return self._saved is not None or self.merged_weight is not None

    def effective_weight(self) -> Tensor:
        """The weight with the change folded in, native layout, in the weight's dtype.

        Raises:
            ModelError: the change is not one matrix, or there is no weight to fold it into.
        """
        change, own = self.delta().detach(), self._flat_weight()
        if self.adapter.replaces_base:
            whole = change
        elif own is not None:
            wide = torch.promote_types(own.dtype, change.dtype)
            whole = own.detach().to(wide) + change.to(wide)
        elif self.site.kind == "bridge":
            whole = change + torch.eye(self.site.d_in, dtype=change.dtype, device=change.device)
        else:
            raise ModelError(
                f"site {self.site.name!r} has no base weight to merge into; construct the layer with "
                "base= or weight="
            )
        return sites.native(self.site, whole if own is None else whole.to(own.dtype))

    def merge(self) -> None:
        """Fold the change into the base weight.

        The base module gets a new weight; the old one is kept aside, untouched, so a tied weight elsewhere
        does not change.

        Raises:
            ModelError: already merged, or the change cannot be merged.
        """
        if self.merged:
            raise ModelError(f"site {self.site.name!r} is already merged; unmerge first")
        merged = self.effective_weight()
        if self.base is not None:
            saved = self.base._parameters["weight"]
            self._saved = saved
            self.base._parameters["weight"] = sites.frozen_copy(merged)
        else:
            self.merged_weight = merged

    def unmerge(self) -> None:
        """Put the saved weight back: the same tensor object, bit for bit.

        Raises:
            ModelError: not merged.
        """
        if not self.merged:
            raise ModelError(f"site {self.site.name!r} is not merged")
        if self.base is not None:
            self.base._parameters["weight"] = self._saved
            self._saved = None
        self.merged_weight = None

    def resize(self, rank: int) -> None:
        """Change the rank in place; ranks that stay keep their function.

        Raises:
            ConfigError: the adapter has no rank, or it does not fit the site.
            ModelError: the layer is merged.
        """
        if self.merged:
            raise ModelError(f"site {self.site.name!r} is merged; unmerge before changing the rank")
        own = self._flat_weight()
        source = None if own is None else sites.as_float64(own)
        theta = {name: value.detach() for name, value in self.theta.items()}
        adapter, theta, basis = self.adapter.resize(
            self.site, theta, self.basis, rank=rank, weight=source, seed=self.seed
        )
        self.adopt(adapter, theta, basis)

    def adopt(self, adapter: Adapter, theta: Tensors, basis: Tensors) -> None:
        """Continue with another adapter of the same family and its tensors (after a resize or a change of phase).

        Optimisers must be rebuilt: the parameters are new objects.
        """
        adapter.leaves(self.site)
        device = next(iter(self.theta.values())).device
        self.adapter = adapter
        self._set_basis({name: value.detach() for name, value in basis.items()})
        old, leaves = dict(self.theta.items()), self.leaves()
        self.theta = nn.ParameterDict()
        for name, value in theta.items():
            kept = old.get(name)
            if leaves[name].scope == "group" and kept is not None and kept.shape == value.shape:
                self.theta[name] = kept  # other sites of the group own the same object
            else:
                self.theta[name] = nn.Parameter(value.detach())
        self._move(device)

    def release(self) -> nn.Module | None:
        """Return the base module as it was before: unmerged, with its own requires_grad flags."""
        if self.merged:
            self.unmerge()
        if self.base is not None:
            for parameter, flag in zip(self.base.parameters(), self._was_trainable, strict=True):
                parameter.requires_grad_(flag)
        return self.base

    def extra_repr(self) -> str:
        """Site and adapter, for printing."""
        return f"site={self.site.name!r}, kind={self.site.kind}, adapter={self.adapter.spec}"


def _identity(x: Tensor) -> Tensor:
    return x


def _apply_weight(site: Site, weight: Tensor, x: Tensor) -> Tensor:
    return sites.apply(site, x, sites.flat(site, weight))
