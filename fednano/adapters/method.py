"""What every adapter inherits: everything that follows from its leaves and its delta.

A family writes `trainable` (metadata) and `delta`; frozen leaves if it has them; and a `path` that never
forms the delta if its algebra allows. One level of inheritance, no state.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fednano.adapters import philox, sites
from fednano.adapters.fused import LowRank, fused_low_rank, kernels_for
from fednano.adapters.protocol import Algebra, Basis, Kind, Leaf, Site, Tensors
from fednano.errors import ConfigError, ModelError

__all__ = ["ALL_KINDS", "Method"]

ALL_KINDS: frozenset[Kind] = frozenset(("linear", "conv2d", "embedding", "bridge"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Base of the adapters.

    Attributes:
        personal: names of trainable leaves that stay at the client and never travel.
        dropout: probability of dropping an input element of the path while training.
    """

    name: ClassVar[str] = ""
    kinds: ClassVar[frozenset[Kind]] = ALL_KINDS
    instead: ClassVar[str] = "lora"  # named in the message when a site's kind is not supported
    size_option: ClassVar[str] = "rank"
    grows_silently: ClassVar[bool] = True  # whether new ranks add nothing before they are trained

    personal: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"adapter {self.name!r}: got dropout={self.dropout}; expected 0 <= dropout < 1")
        rank = getattr(self, self.size_option, 1)
        if rank < 1:
            raise ConfigError(f"adapter {self.name!r}: got {self.size_option}={rank}; expected >= 1")
        self.validate()

    def validate(self) -> None:  # noqa: B027 - most adapters have nothing more to check
        """Check options that do not depend on a site; called at construction."""

    @property
    @abc.abstractmethod
    def algebra(self) -> Algebra:
        """What the delta is in the shared leaves."""

    @property
    def basis(self) -> Basis:
        """Where the frozen leaves come from."""
        return Basis.NONE

    @property
    def spec(self) -> str:
        """Canonical text of name and options."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({"adapter": self.name, **values}, sort_keys=True)

    @property
    def mergeable(self) -> bool:
        """Whether the change is one matrix."""
        return True

    @property
    def starts_off_zero(self) -> bool:
        """Whether the change differs from zero before training, by design."""
        return False

    @property
    def replaces_base(self) -> bool:
        """Whether ``path`` is the whole layer and the base weight is not used."""
        return False

    def largest_rank(self, site: Site) -> int:
        """The largest rank that makes sense at a site; any, for methods whose size is not a rank."""
        return site.full_rank

    def check(self, site: Site) -> None:
        """Raise if the adapter cannot sit at the site.

        Raises:
            ModelError: the site's kind is not supported.
            ConfigError: the rank exceeds min(d_in, d_out).
        """
        if site.kind not in self.kinds:
            raise ModelError(
                f"adapter {self.name!r} cannot sit on {site.kind} site {site.name!r}; it supports "
                f"{', '.join(sorted(self.kinds))}. Choose other sites, or an adapter such as {self.instead!r}"
            )
        rank, limit = getattr(self, "rank", 1), self.largest_rank(site)
        if rank > limit:
            from_sizes = f"min(d_in={site.d_in}, d_out={site.d_out}) = {site.full_rank}"
            bound = from_sizes if limit == site.full_rank else f"{limit}, from {from_sizes}"
            raise ConfigError(
                f"adapter {self.name!r}: got rank={rank} at site {site.name!r}; expected rank <= {bound}"
            )
        if self.dropout and site.kind == "embedding":
            raise ConfigError(
                f"adapter {self.name!r}: got dropout={self.dropout} at embedding site {site.name!r}; "
                "token ids cannot be "
                "dropped: set dropout=0"
            )

    @abc.abstractmethod
    def trainable(self, site: Site) -> dict[str, Leaf]:
        """Trainable leaves, before `personal` is applied."""

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """Frozen leaves, as `freeze` will return them."""
        return {}

    def leaves(self, site: Site) -> dict[str, Leaf]:
        """Trainable leaves of a site: metadata only, nothing is allocated.

        Raises:
            ModelError: the site's kind is not supported.
            ConfigError: the rank does not fit, or ``personal`` names no leaf.
        """
        self.check(site)
        found = self.trainable(site)
        for name in self.personal:
            if name not in found:
                raise ConfigError(
                    f"adapter {self.name!r}: personal leaf {name!r} does not exist; leaves: "
                    f"{', '.join(found)}"
                )
        return {
            name: dataclasses.replace(leaf, role="personal") if name in self.personal else leaf
            for name, leaf in found.items()
        }

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Compute the frozen leaves on the CPU: here, for leaves that have a seeded init.

        Args:
            site: the site.
            weight: ``(d_out, d_in)`` or None.
            seed: the run's seed.
            stats: statistics gathered for the site, such as ``gradient`` ``(d_out, d_in)``.
        """
        return self._draw(site, self.frozen(site), seed)

    def start(self, site: Site, seed: int, basis: Tensors, weight: Tensor | None) -> Tensors:
        """Initial trainable leaves, on the CPU."""
        leaves = self.leaves(site)
        drawn = self._draw(site, leaves, seed)
        for name, leaf in leaves.items():
            if leaf.init.kind == "computed":
                drawn[name] = self.compute(site, name, seed, basis, weight).to(leaf.dtype).clone()
        return drawn

    def compute(self, site: Site, name: str, seed: int, basis: Tensors, weight: Tensor | None) -> Tensor:
        """Initial value of a leaf whose init is ``computed``."""
        raise NotImplementedError(f"{self.name} declares {name!r} as computed and does not compute it")

    def _draw(self, site: Site, leaves: Mapping[str, Leaf], seed: int) -> Tensors:
        drawn: Tensors = {}
        for name, leaf in leaves.items():
            owner = site.group if leaf.scope == "group" and site.group else site.name
            k, scale = philox.key(seed, owner, name), leaf.init.scale
            if leaf.init.kind == "zeros":
                drawn[name] = torch.zeros(leaf.shape, dtype=leaf.dtype)
            elif leaf.init.kind == "constant":
                drawn[name] = torch.full(leaf.shape, scale, dtype=leaf.dtype)
            elif leaf.init.kind == "uniform":
                drawn[name] = philox.uniform(k, leaf.shape, scale)
            elif leaf.init.kind == "normal":
                drawn[name] = philox.normal(k, leaf.shape, scale)
        return drawn

    def derive(self, site: Site, basis: Tensors) -> Tensors:
        """Tables that follow from the basis and need neither shipping nor hashing."""
        return {}

    @abc.abstractmethod
    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """The change ``(d_out, d_in)``.

        Raises:
            ModelError: the change is not one matrix (``mergeable`` is False).
        """

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """What the change adds to the output; here through the dense delta."""
        return sites.apply(site, x, self.delta(site, theta, basis, weight))

    def low_rank_form(self, theta: Tensors, basis: Tensors) -> LowRank | None:
        """The change as a product of two factors; None for one that has no such form."""
        return None

    def low_rank(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors) -> tuple[Tensor, Tensor] | None:
        """``path(x)`` at a linear or bridge site as ``z @ up``, ``(..., r)`` and ``(r, d_out)``; None without form."""
        form = self.low_rank_form(theta, basis)
        return None if form is None or site.kind not in ("linear", "bridge") else form.split(x)

    def forward(
        self,
        site: Site,
        x: Tensor,
        base: Callable[[Tensor], Tensor] | None,
        theta: Tensors,
        basis: Tensors,
        *,
        weight: Tensor | None,
        training: bool,
    ) -> Tensor:
        """``base(x) + path(x)``. The path runs in the leaves' dtype and returns in the base's.

        Args:
            site: the site.
            x: input, see `sites.apply`.
            base: the frozen layer; None where the path is the whole output.
            theta: trainable leaves.
            basis: frozen leaves and derived tables.
            weight: ``(d_out, d_in)`` or None.
            training: whether dropout is active.
        """
        if not (training and self.dropout) and (kernels := kernels_for(x)) is not None:
            form = self.low_rank_form(theta, basis)
            fused = None if form is None else fused_low_rank(kernels, site, x, base, form)
            if fused is not None:
                return fused
        inside = x
        if x.is_floating_point():
            inside = x.to(next(iter(theta.values())).dtype)
            if self.dropout:
                inside = F.dropout(inside, self.dropout, training)
        extra = self.path(site, inside, theta, basis, weight)
        if base is None:
            return extra.to(x.dtype) if x.is_floating_point() else extra
        out = base(x)
        return out + extra.to(out.dtype)

    @property
    def resizable(self) -> bool:
        """Whether `resize` works; `size_option` names the option that it changes."""
        return any(field.name == self.size_option for field in dataclasses.fields(self))

    def resized(self, rank: int) -> Method:
        """The same adapter with another rank; the factor before the change stays what it was."""
        change: dict[str, Any] = {self.size_option: rank}
        return dataclasses.replace(self, **change)

    def resize(
        self, site: Site, theta: Tensors, basis: Tensors, *, rank: int, weight: Tensor | None, seed: int
    ) -> tuple[Method, Tensors, Tensors]:
        """Another rank: leaves are cut to their first ranks, or grow by fresh ones.

        Args:
            site: the site.
            theta: trainable leaves.
            basis: frozen leaves.
            rank: the new value of the option `size_option`.
            weight: ``(d_out, d_in)`` or None; a basis from the weight grows by its next directions, or
                without it by seeded ones.
            seed: the run's seed, for what is new.

        Returns:
            ``(adapter, theta, basis)`` of the new rank. Ranks that stay keep their function; if
            ``grows_silently``, new ones add nothing until they are trained.

        Raises:
            ConfigError: the method has no rank that can change, or the new one does not fit.
        """
        if not self.resizable:
            raise ConfigError(
                f"adapter {self.name!r} has no rank that can be changed; create a new adapter instead"
            )
        other = self.resized(rank)
        other.leaves(site)
        frozen = other.frozen(site)
        old = {name: value.cpu() for name, value in basis.items()}
        if all(value.shape == frozen[name].shape for name, value in old.items()):
            grown = old
        elif rank < getattr(self, self.size_option):
            grown = {name: _cut(value, frozen[name].shape) for name, value in old.items()}
        else:
            grown = other.extend(site, old, weight, seed)
        fresh = other.start(site, seed, grown, weight)
        other.quiet(fresh, theta, grown)
        for name, value in fresh.items():
            _overlay(value, theta[name].cpu())
            fresh[name] = value.to(theta[name].dtype)
        return other, fresh, grown

    def extend(self, site: Site, basis: Tensors, weight: Tensor | None, seed: int) -> Tensors:
        """Grow a smaller basis to this adapter's size; what was there stays, bit for bit."""
        grown = self.freeze(site, weight, seed, None)
        for name, value in grown.items():
            _overlay(value, basis[name])
        return grown

    def quiet(self, fresh: Tensors, theta: Tensors, basis: Tensors) -> None:  # noqa: B027 - zero init is quiet
        """Set the new parts of ``fresh`` so that growing does not change the function; ``theta`` are the old leaves."""


def _cut(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    return value[tuple(slice(0, size) for size in shape)].clone()


def _overlay(new: Tensor, old: Tensor) -> None:
    """Copy the common leading block of ``old`` into ``new``, in place."""
    block = tuple(slice(0, min(a, b)) for a, b in zip(new.shape, old.shape, strict=True))
    new[block] = old[block].to(new.dtype)
