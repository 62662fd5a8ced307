"""What the server expects of every update: leaves, the products they form, fingerprints and bounds.

Leaves are keyed ``"<site>.<leaf>"``. Where two leaves form a product (every low-rank adapter), the
specification says so with a `Product`: ``delta = scale * left @ right``. LoRA keeps ``B (d_out, r)`` on the
left and ``A (r, d_in)`` on the right; a NanoAdapter works on rows and keeps ``A (d, r)`` on the left and
``B (r, d)`` on the right. Rules that merge products need only left and right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from fednano.errors import ConfigError

__all__ = ["LeafSpec", "Product", "Spec"]


@dataclass(frozen=True)
class LeafSpec:
    """Shape and dtype of one leaf."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf without any encoding."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Product:
    """Two leaves that act as ``delta = scale * left @ right``.

    Attributes:
        left: name of the leaf of shape ``(m, r)``.
        right: name of the leaf of shape ``(r, n)``.
        scale: factor of the global adapter's own delta (``alpha / r`` for LoRA).
        down: which side reads the layer's input, "left" or "right". It is the side that starts random (LoRA's A),
            which rules that freeze or share one factor must know. Empty: taken from the leaf named ``A`` or ``down``.
    """

    left: str
    right: str
    scale: float = 1.0
    down: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0.0:
            raise ConfigError(
                f"product {self.left} @ {self.right}: got scale {self.scale}, expected finite and not 0"
            )
        if not self.down:
            last = {
                side: name.rsplit(".", 1)[-1] for side, name in (("left", self.left), ("right", self.right))
            }
            found = [side for side, leaf in last.items() if leaf in ("A", "down")]
            object.__setattr__(self, "down", found[0] if len(found) == 1 else "unknown")
        if self.down not in ("left", "right", "unknown"):
            raise ConfigError(
                f"product {self.left} @ {self.right}: got down={self.down!r}, expected 'left' or 'right'"
            )

    def _side(self, want_down: bool) -> str:
        if self.down == "unknown":
            raise ConfigError(
                f"product {self.left} @ {self.right}: cannot tell which factor reads the input; "
                "pass Product(..., down='left') or down='right'"
            )
        return self.left if (self.down == "left") == want_down else self.right

    @property
    def A(self) -> str:  # noqa: N802 - the field's name for the factor
        """Name of the factor that reads the input and starts random."""
        return self._side(True)

    @property
    def B(self) -> str:  # noqa: N802
        """Name of the factor that writes the output and starts at zero."""
        return self._side(False)


@dataclass(frozen=True)
class Spec:
    """What the server expects of every update of a run, and the bounds its accumulators are built for.

    Attributes:
        leaves: shape and dtype of each travelling leaf of the global adapter.
        algebra: "affine", "multilinear" or "nonlinear": the adapter's delta as a function of its leaves.
        products: site name to the product its leaves form; empty for adapters that are not products.
        spec: fingerprint of the adapter configuration; an update must carry the same.
        basis: fingerprint of the frozen basis; an update must carry the same.
        max_clients: updates that one round may merge. Fixes the fixed-point step, see `fixedpoint`.
        max_abs: bound on the absolute value of any leaf's element.
        max_weight: bound on an update's weight (its number of samples, say).
        max_norm: optional bound on the Euclidean norm of all leaves of an update together.
        rank_limit: None: ranks must be those of `leaves`. A number: a client's products may have any rank up to it.
    """

    leaves: Mapping[str, LeafSpec]
    algebra: str = "multilinear"
    products: Mapping[str, Product] = field(default_factory=dict)
    spec: str = ""
    basis: str = ""
    max_clients: int = 2048
    max_abs: float = 32.0
    max_weight: float = 65536.0
    max_norm: float | None = None
    rank_limit: int | None = None

    def __post_init__(self) -> None:
        if not self.leaves:
            raise ConfigError("a Spec without leaves: nothing would travel; give at least one leaf")
        if self.algebra not in ("affine", "multilinear", "nonlinear"):
            raise ConfigError(
                f"algebra: got {self.algebra!r}, expected 'affine', 'multilinear' or 'nonlinear'"
            )
        if self.max_clients < 1:
            raise ConfigError(f"max_clients: got {self.max_clients}, expected at least 1")
        for name in ("max_abs", "max_weight", "max_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"{name}: got {value}, expected a positive finite number")
        if self.rank_limit is not None and self.rank_limit < 1:
            raise ConfigError(f"rank_limit: got {self.rank_limit}, expected None or at least 1")
        for name, leaf in self.leaves.items():
            if not leaf.dtype.is_floating_point:
                raise ConfigError(
                    f"leaf {name}: got dtype {leaf.dtype}, expected a floating dtype (indices do not travel up)"
                )
        for site, product in self.products.items():
            for side in (product.left, product.right):
                if side not in self.leaves or len(self.leaves[side].shape) != 2:
                    raise ConfigError(f"product of site {site!r}: leaf {side!r} must exist and be a matrix")
            if self.leaves[product.left].shape[1] != self.leaves[product.right].shape[0]:
                raise ConfigError(
                    f"product of site {site!r}: {product.left} {self.leaves[product.left].shape} and "
                    f"{product.right} {self.leaves[product.right].shape} cannot be multiplied"
                )

    @property
    def numel(self) -> int:
        """Number of elements of all leaves."""
        return sum(leaf.numel for leaf in self.leaves.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves without any encoding."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def rank(self, site: str) -> int:
        """Rank of a site's product in the global adapter."""
        return self.leaves[self.products[site].left].shape[1]

    def restrict(self, names: Iterable[str]) -> Spec:
        """The same specification for some of the leaves; products that lose a factor are dropped."""
        keep = set(names)
        return replace(
            self,
            leaves={k: v for k, v in self.leaves.items() if k in keep},
            products={s: p for s, p in self.products.items() if p.left in keep and p.right in keep},
        )

    def rank_axes(self) -> dict[str, tuple[str, int]]:
        """Leaf name to its site and the axis along which the rank runs."""
        axes: dict[str, tuple[str, int]] = {}
        for site, product in self.products.items():
            axes[product.left] = (site, 1)
            axes[product.right] = (site, 0)
        return axes
