"""Rules that keep one factor of each product fixed or at home: FFA, RoLoRA, FedSA, FedDPA.

The mean of products is the product of means as soon as all clients share one factor, so averaging the other is exact:
``sum_k w_k B_k A = (sum_k w_k B_k) A``.
"""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fednano.aggregation.mean import MeanRule
from fednano.aggregation.rule import Capability, Scalar, State
from fednano.aggregation.spec import Spec
from fednano.aggregation.update import Leaves
from fednano.errors import ConfigError

__all__ = ["FFA", "FedDPA", "FedSA", "RoLoRA", "instance_mix"]

_PRODUCT = frozenset({"multilinear", "nonlinear"})


def _factors(spec: Spec, rule: str, side: str) -> set[str]:
    if not spec.products:
        raise ConfigError(
            f"rule {rule!r} keeps one factor of each product fixed, and this adapter has no products"
        )
    return {product.A if side == "A" else product.B for product in spec.products.values()}


class _FixedFactor(MeanRule):
    """The mean of what travels; the other factor stays as it is on the server, so ``current`` is needed."""

    def init(
        self, spec: Spec, *, current: Leaves | None = None, memory: Leaves | None = None, round: int = 0
    ) -> State:
        """See `Rule.init`; ``current`` is needed."""
        state = super().init(spec, current=current, memory=memory, round=round)
        state.require_current(self.name)
        return state


@dataclass(frozen=True)
class FFA(_FixedFactor):
    """A stays at its shared start, B is averaged (FFA-LoRA, arXiv 2403.12313)."""

    name: ClassVar[str] = "ffa"
    capability: ClassVar[Capability] = Capability(
        summary="A frozen at its shared start, B averaged",
        paper="2403.12313",
        exact=_PRODUCT,
        exact_note="the mean of the deltas: they are linear in B, also behind a GELU",
        allowed=_PRODUCT,
        bytes_up="1/2",
        bytes_down="1/2",
        needs=frozenset({"products"}),
    )

    def travelling(self, spec: Spec, round: int = 0) -> tuple[str, ...]:
        """All leaves but each product's A."""
        frozen = _factors(spec, self.name, "A")
        return tuple(n for n in spec.leaves if n not in frozen)

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """``frozen``: the factor that is not trained."""
        return {"frozen": "A"}


@dataclass(frozen=True)
class RoLoRA(_FixedFactor):
    """Odd rounds train and average B with A fixed, even rounds the reverse (arXiv 2502.01755)."""

    name: ClassVar[str] = "rolora"
    capability: ClassVar[Capability] = Capability(
        summary="odd rounds train and average B with A fixed, even rounds the reverse",
        paper="2502.01755",
        exact=frozenset({"multilinear"}),
        exact_note="the mean of the deltas in each round: one factor is shared while the other moves",
        allowed=_PRODUCT,
        bytes_up="1/2",
        bytes_down="1, 1/2 in the first round",
        needs=frozenset({"products"}),
        late=False,
    )

    @staticmethod
    def _fixed(round: int) -> str:
        return "A" if round % 2 == 1 else "B"

    def travelling(self, spec: Spec, round: int = 0) -> tuple[str, ...]:
        """All leaves but the factor that this round keeps fixed."""
        frozen = _factors(spec, self.name, self._fixed(round))
        return tuple(n for n in spec.leaves if n not in frozen)

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """``frozen``: the factor that is not trained in this round."""
        return {"frozen": self._fixed(round)}


@dataclass(frozen=True)
class FedSA(_FixedFactor):
    """A is shared and averaged, B (and whatever is no product) never leaves its client (arXiv 2410.01463)."""

    name: ClassVar[str] = "fedsa"
    capability: ClassVar[Capability] = Capability(
        summary="A averaged, B stays with its client: personalised adapters",
        paper="2410.01463",
        exact=frozenset(),
        exact_note="the mean of the A factors; there is no global delta, so evaluate on clients",
        allowed=_PRODUCT,
        bytes_up="1/2",
        bytes_down="1/2",
        needs=frozenset({"products"}),
    )

    def travelling(self, spec: Spec, round: int = 0) -> tuple[str, ...]:
        """Each product's A."""
        shared = _factors(spec, self.name, "A")
        return tuple(n for n in spec.leaves if n in shared)

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """``personal``: the factor that is trained and kept on the client's disk."""
        return {"personal": "B"}


@dataclass(frozen=True)
class FedDPA(MeanRule):
    """Two adapters per client: a global one, averaged, and a personal one that never leaves (arXiv 2403.19211).

    Attributes:
        samples: training samples that each client compares an input with, see `instance_mix`.
        strength: factor on their mean similarity.
    """

    samples: int = 5
    strength: float = 1.0

    name: ClassVar[str] = "feddpa"
    capability: ClassVar[Capability] = Capability(
        summary="a global adapter averaged, a personal one kept, mixed per input by similarity",
        paper="2403.19211",
        exact=frozenset({"affine"}),
        exact_note="as FedAvg for the global adapter; the personal one is not merged",
    )

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0.0 <= self.strength < math.inf:
            raise ConfigError(
                f"feddpa: got samples={self.samples}, strength={self.strength}, expected samples >= 1 and strength >= 0"
            )

    def client_config(self, round: int = 0) -> dict[str, Scalar]:
        """Asks for a personal adapter beside the global one."""
        return {"personal_adapter": True, "mix_samples": self.samples, "mix_strength": self.strength}


def instance_mix(inputs: Tensor, reference: Tensor, strength: float = 1.0) -> Tensor:
    """How much each input should trust the personal adapter: ``y = mix * personal(x) + (1 - mix) * global(x)``.

    The mean cosine similarity between the input's embedding and the embeddings of some of the client's own training
    samples, times ``strength``, clamped to [0, 1].

    Args:
        inputs: embeddings ``(batch, d)``.
        reference: embeddings of the client's own samples ``(samples, d)``.
        strength: factor on the similarity.

    Returns:
        ``(batch,)`` in [0, 1].
    """
    similarity = torch.nn.functional.cosine_similarity(inputs[:, None, :], reference[None, :, :], dim=-1)
    return (strength * similarity.mean(dim=1)).clamp(0.0, 1.0)
