"""MoS (arXiv 2410.00938): layers build their factors from a shared pool of shards, plus a few of their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fednano.adapters import philox, sites
from fednano.adapters.lora import Scaled
from fednano.adapters.protocol import Algebra, Basis, Init, Leaf, Site, Tensors
from fednano.adapters.registry import register
from fednano.errors import ConfigError, ModelError

__all__ = ["MoS"]


@register("mos")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoS(Scaled):
    """``delta = s B A`` whose ranks are rows put together from ``shards`` pieces of a pool. Parameters: ``pool_rank
    L (d_in + d_out)``.

    The L sites of one group (`Site.group`) share pools of ``(pool_rank - private_rank) L shards`` pieces, ``(d_in /
    shards)`` long for A and ``(d_out / shards)`` for B. Each site takes ``(rank - private_rank) shards`` of them,
    chosen by the seed and separately for A and B, and owns ``private_rank shards`` more, which stay at the client.
    So the active rank may exceed the rank that is paid for. A is Kaiming-uniform with the fan of the whole row, B zero.

    Attributes:
        pool_rank: e, what the pools cost as a LoRA rank.
        shards: l, pieces per row; must divide d_in and d_out.
        private_rank: p, ranks that belong to the site alone.
    """

    grows_silently = False

    pool_rank: int = 2
    shards: int = 2
    private_rank: int = 1

    def validate(self) -> None:
        """Check the options."""
        if self.pool_rank < 1 or self.shards < 1:
            raise ConfigError(
                f"adapter {self.name!r}: got pool_rank={self.pool_rank}, shards={self.shards}; expected both >= 1"
            )
        if not 0 <= self.private_rank < min(self.pool_rank, self.rank):
            raise ConfigError(
                f"adapter {self.name!r}: got private_rank={self.private_rank}; expected 0 <= private_rank < "
                f"min(pool_rank={self.pool_rank}, rank={self.rank})"
            )

    @property
    def algebra(self) -> Algebra:
        """A product of shared rows."""
        return Algebra.MULTILINEAR

    @property
    def basis(self) -> Basis:
        """The choice of shards is seeded."""
        return Basis.SEED

    def check(self, site: Site) -> None:
        """Rows must divide into shards."""
        super().check(site)
        if site.d_in % self.shards or site.d_out % self.shards:
            raise ModelError(
                f"adapter {self.name!r} cannot sit on {site.kind} site {site.name!r}: d_in={site.d_in} and "
                f"d_out={site.d_out} must be divisible by shards={self.shards}; choose another number of shards"
            )

    def trainable(self, site: Site) -> dict[str, Leaf]:
        """Pools of the group, and private rows of the site."""
        public = (self.pool_rank - self.private_rank) * site.group_size * self.shards
        private = self.private_rank * self.shards
        leaves: dict[str, Leaf] = {}
        for name, width in (("A", site.d_in), ("B", site.d_out)):
            init = Init("uniform", 1 / math.sqrt(width)) if name == "A" else Init()
            leaves[f"pool_{name}"] = Leaf((public, width // self.shards), init=init, scope="group")
            if private:
                leaves[f"own_{name}"] = Leaf((private, width // self.shards), init=init, role="personal")
        return leaves

    def frozen(self, site: Site) -> dict[str, Leaf]:
        """Which rows of the pools this site uses."""
        count = (self.rank - self.private_rank) * self.shards
        return {f"index_{name}": Leaf((count,), torch.int64, role="index") for name in "AB"}

    def freeze(
        self, site: Site, weight: Tensor | None, seed: int, stats: Mapping[str, Tensor] | None
    ) -> Tensors:
        """Random rows without repetition; once every row is used, all of them again in another order."""
        public = (self.pool_rank - self.private_rank) * site.group_size * self.shards
        chosen: Tensors = {}
        for name, leaf in self.frozen(site).items():
            rounds = -(-leaf.shape[0] // public)
            orders = [
                philox.sample(philox.key(seed, site.name, f"{name}.{turn}"), public, public)
                for turn in range(rounds)
            ]
            chosen[name] = torch.cat(orders)[: leaf.shape[0]]
        return chosen

    def _factors(self, site: Site, theta: Tensors, basis: Tensors) -> tuple[Tensor, Tensor]:
        rows = []
        for name, width in (("A", site.d_in), ("B", site.d_out)):
            pieces = theta[f"pool_{name}"][basis[f"index_{name}"]]
            if self.private_rank:
                pieces = torch.cat([theta[f"own_{name}"], pieces])
            rows.append(pieces.reshape(self.rank, width))
        return rows[0], rows[1].T

    def delta(self, site: Site, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B A``."""
        a, b = self._factors(site, theta, basis)
        return self.scale * (b @ a)

    def path(self, site: Site, x: Tensor, theta: Tensors, basis: Tensors, weight: Tensor | None) -> Tensor:
        """``s B (A x)``."""
        a, b = self._factors(site, theta, basis)
        return self.scale * sites.low_rank(site, x, a, b)
