"""The few types every adapter is made of.

An adapter is a parametrisation of the change at a *site* of a model. It is a stateless, frozen dataclass
of options; its state is plain dictionaries of tensors: ``theta`` (trainable leaves) and ``basis`` (frozen
leaves). What it declares about itself (its algebra, where its basis comes from, its leaves) decides how
its updates are merged, shipped and counted, before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fednano.errors import ModelError

__all__ = ["Adapter", "Algebra", "Basis", "Init", "Kind", "Leaf", "Role", "Site", "Tensors"]

Tensors = dict[str, Tensor]
Kind = Literal["linear", "conv2d", "embedding", "bridge"]
Role = Literal["shared", "personal", "index", "frozen"]


class Algebra(Enum):
    """What the delta is in the trainable leaves; decides how updates may be merged."""

    AFFINE = "affine"  # the mean of the leaves gives the mean of the deltas, exactly
    MULTILINEAR = "multilinear"  # a product of leaves: the mean of factors is not the mean of products
    NONLINEAR = "nonlinear"


class Basis(Enum):
    """Where the frozen leaves come from."""

    NONE = "none"
    SEED = "seed"  # recomputed anywhere from (seed, site, leaf); never shipped
    WEIGHT = "weight"  # from the site's weight; computed once, shipped
    STATS = "stats"  # from gathered statistics such as gradients; computed once, shipped


@dataclass(frozen=True)
class Init:
    """How a leaf starts.

    Attributes:
        kind: ``zeros``; ``constant`` (``scale`` everywhere); ``uniform`` in (-scale, scale); ``normal``
            with standard deviation ``scale``; ``computed`` by the adapter from its basis.
        scale: see ``kind``.
    """

    kind: Literal["zeros", "constant", "uniform", "normal", "computed"] = "zeros"
    scale: float = 1.0


@dataclass(frozen=True)
class Leaf:
    """Metadata of one tensor of an adapter.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        init: how it starts.
        role: ``shared`` travels up and down every round; ``personal`` is trained and never leaves the
            client; ``index`` (integers) and ``frozen`` belong to the basis and travel down once at most.
        scope: ``site``, or ``group`` for a leaf that all sites of one group own together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    init: Init = Init()
    role: Role = "shared"
    scope: Literal["site", "group"] = "site"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf in its own dtype."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Site:
    """A place in a model that can carry an adapter.

    The change at any site is one matrix ``(d_out, d_in)``. A linear site's weight has that layout. A
    conv2d site's is ``(out, in/groups, kh, kw)`` flattened to ``(out, in/groups*kh*kw)``. An embedding's
    table ``(d_in rows, d_out)`` is its transpose. A bridge has no base weight: it computes ``x + path(x)``.

    Attributes:
        name: dotted name, unique in the model.
        kind: see above.
        d_in: columns of the change.
        d_out: rows of the change.
        kernel: conv2d only, as are ``stride``, ``padding``, ``dilation`` and ``groups``.
        stride: conv2d stride.
        padding: conv2d padding.
        dilation: conv2d dilation.
        groups: conv2d groups.
        group: name of the set of sites that share group leaves (MoS pools); empty: this site alone.
        group_size: how many sites the group has.
        group_index: this site's position in its group.
    """

    name: str
    kind: Kind
    d_in: int
    d_out: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    group: str = ""
    group_size: int = 1
    group_index: int = 0

    def __post_init__(self) -> None:
        if self.d_in < 1 or self.d_out < 1:
            raise ModelError(
                f"site {self.name!r}: got d_in={self.d_in}, d_out={self.d_out}; expected both >= 1"
            )
        if self.kind == "bridge" and self.d_in != self.d_out:
            raise ModelError(
                f"bridge site {self.name!r}: got d_in={self.d_in}, d_out={self.d_out}; a bridge adds to "
                "its input, "
                "so both must be equal; use a linear site to change the width"
            )
        if not 0 <= self.group_index < self.group_size:
            raise ModelError(
                f"site {self.name!r}: group_index {self.group_index} outside group of {self.group_size} sites"
            )

    @property
    def full_rank(self) -> int:
        """min(d_in, d_out), the largest rank that a change can have."""
        return min(self.d_in, self.d_out)

    def in_group(self, group: str, size: int, index: int) -> Site:
        """Return this site as member ``index`` of a group of ``size`` sites."""
        return replace(self, group=group, group_size=size, group_index=index)

    @staticmethod
    def of(name: str, module: nn.Module) -> Site:
        """Describe a module as a site.

        Raises:
            ModelError: the module is none of nn.Linear, nn.Conv2d, nn.Embedding, or has a feature that no
                adapter can follow.
        """
        if isinstance(module, nn.Linear):
            return Site(name, "linear", module.in_features, module.out_features)
        if isinstance(module, nn.Embedding):
            if type(module).forward is not nn.Embedding.forward or module.max_norm is not None:
                raise ModelError(
                    f"site {name!r}: {type(module).__name__} changes its rows after the lookup (own "
                    "forward or max_norm), "
                    "which a change of the table cannot follow; put a bridge behind it instead"
                )
            return Site(name, "embedding", module.num_embeddings, module.embedding_dim)
        if isinstance(module, nn.Conv2d):
            if module.padding_mode != "zeros":
                raise ModelError(
                    f"conv2d site {name!r}: got padding_mode={module.padding_mode!r}; only 'zeros' is "
                    "supported"
                )
            kh, kw = module.kernel_size
            padding = module.padding
            return Site(
                name,
                "conv2d",
                module.in_channels // module.groups * kh * kw,
                module.out_channels,
                kernel=(kh, kw),
                stride=(module.stride[0], module.stride[1]),
                padding=padding if isinstance(padding, str) else (padding[0], padding[1]),
                dilation=(module.dilation[0], module.dilation[1]),
                groups=module.groups,
            )
        raise ModelError(
            f"site {name!r} is a {type(module).__name__}; adapters sit on nn.Linear, nn.Conv2d, "
            "nn.Embedding, "
            "or on a bridge (no base module)"
        )


@runtime_checkable
class Adapter(Protocol):
    """A parametrisation of the change at a site. Stateless: theta and basis are given to every call.

    ``delta`` is the only compulsory maths; `fednano.adapters.method.Method` derives the rest from it, and
    an adapter overrides what it can do better.
    """

    @property
    def name(self) -> str:
        """Name in the registry."""
        ...

    @property
    def algebra(self) -> Algebra:
        """What the delta is in the shared leaves."""
        ...

    @property
    def basis(self) -> Basis:
        """Where the frozen leaves come from."""
        ...

    @property
    def spec(self) -> str:
        """Canonical text of name and options; two adapters are the same if and only if their specs are
        equal."""
        ...

    @property
    def mergeable(self) -> bool:
        """Whether the change is one matrix; if not, ``delta`` raises ModelError."""
        ...

    @property
    def starts_off_zero(self) -> bool:
        """Whether the change differs from zero before any training, by design."""
        ...

    @property
    def replaces_base(self) -> bool:
        """Whether ``path`` is the whole layer (trained from scratch) and the base weight is not used."""
        ...

    def leaves(self, site: Site) -> dict[str, Leaf]:
        """Trainable leaves. Raises ModelError or ConfigError if the adapter does not fit the site."""
        ...

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """Frozen leaves, as `freeze` will return them."""
        ...

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Compute the frozen leaves from ``weight`` ``(d_out, d_in)``, the seed, or statistics, on the
        CPU."""
        ...

    def start(self, site: Site, seed: int, basis: Tensors, weight: Tensor | None) -> Tensors:
        """Initial trainable leaves, on the CPU."""
        ...

    def derive(self, site: Site, basis: Tensors) -> Tensors:
        """Tables that follow from the basis and need neither shipping nor hashing."""
        ...

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """The change ``(d_out, d_in)``."""
        ...

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """What the change adds to the output: ``x`` ``(..., d_in)`` to ``(..., d_out)`` (conv2d: images;
        embedding: ids)."""
        ...

    def low_rank(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors) -> tuple[Tensor, Tensor] | None:
        """``path(x)`` at a linear or bridge site as ``z @ up``, ``z`` ``(..., r)`` and ``up`` ``(r, d_out)``.

        None for a change that has no such form.
        """
        ...

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
        """The layer's output, ``base(x) + path(x)`` unless the method says otherwise."""
        ...

    def resize(
        self, site: Site, theta: Tensors, basis: Tensors, *, rank: int, weight: Tensor | None, seed: int
    ) -> tuple[Adapter, Tensors, Tensors]:
        """Another rank: ``(adapter, theta, basis)``; ranks that stay keep their function."""
        ...
