"""What a client sends after local training, and the check before it is merged."""

# ruff: noqa: A002 - `round` is the field's own word for what it names
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fednano.aggregation.reduce import nonnegative_sum
from fednano.aggregation.spec import Product, Spec
from fednano.errors import UpdateRefused

__all__ = ["Leaves", "Reason", "Refusal", "Update", "validate"]

Leaves = dict[str, Tensor]

Reason = Literal[
    "spec",  # another adapter configuration
    "basis",  # another frozen basis
    "round",  # not this round's update
    "schema",  # leaves missing, unknown, or of a wrong shape or dtype
    "rank",  # a rank that is not admitted, or not the one the client had
    "scale",  # a product scale that is zero or not finite
    "weight",  # a weight that is not positive, not finite, or out of range
    "nonfinite",  # NaN or infinity
    "norm",  # a value or a norm above the bound
    "fisher",  # missing, negative or useless Fisher
    "metric",  # a number the rule needs (loss, steps) is missing or not usable
    "duplicate",  # the client has already been merged in this round
    "capacity",  # more clients than the accumulators admit
    "codec",  # the encoded form cannot be decoded
]


class Refusal(UpdateRefused):
    """An update that must not be merged.

    Attributes:
        reason: one word for metrics and logs, see `Reason`.
        client: who sent it.
    """

    def __init__(self, reason: Reason, message: str, client: str = "") -> None:
        super().__init__(f"update of client {client!r} refused ({reason}): {message}" if client else message)
        self.reason: Reason = reason
        self.client = client


@dataclass(frozen=True)
class Update:
    """What a client sends after local training.

    Attributes:
        client: stable name of the client; rules that must see all updates sort by it.
        round: the round it was trained for.
        weight: positive; usually its number of samples. Weights may sum to anything.
        leaves: name to tensor, shapes as in the `Spec` (but for the rank, where that is admitted).
        fisher: name to the diagonal Fisher information, same shapes, not negative; None if not computed.
        spec: fingerprint of the adapter configuration it was trained with.
        basis: fingerprint of the frozen basis it was trained with.
        scales: site to the client's own product scale; a site not named has the scale of the `Spec`.
        metrics: numbers that some rules need: "loss" (q-FedAvg), "steps" and "lr" (SCAFFOLD).
    """

    client: str
    round: int
    weight: float
    leaves: Leaves
    fisher: Leaves | None = None
    spec: str = ""
    basis: str = ""
    scales: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def scale(self, site: str, product: Product) -> float:
        """The client's own scale at a site."""
        return float(self.scales.get(site, product.scale))


def validate(
    update: Update,
    spec: Spec,
    *,
    round: int,
    names: Iterable[str] | None = None,
    ranks: Mapping[str, int] | None = None,
    needs_fisher: bool = False,
    values: bool = True,
) -> None:
    """Check everything about an update that can be checked without the others.

    Args:
        update: what the client sent.
        spec: what is expected.
        round: the round being merged; an update of any other round is refused.
        names: the leaves that travel in this round (`Rule.travelling`); None: all leaves of the spec.
        ranks: site to the rank this client had before, if it had one; a change is refused.
        needs_fisher: refuse an update without Fisher.
        values: look at every element. False saves that pass for a rule whose ``capability.streaming`` is true: its
            accumulators refuse NaN, infinity and whatever they cannot hold. They do not look at `Spec.max_norm`, and
            a small weight leaves room for values above `Spec.max_abs`.

    Raises:
        Refusal: with the machine-readable reason.
    """

    def refuse(reason: Reason, message: str) -> Refusal:
        return Refusal(reason, message, update.client)

    if update.spec != spec.spec:
        raise refuse("spec", f"trained with adapter {update.spec!r}, this run has {spec.spec!r}")
    if update.basis != spec.basis:
        raise refuse("basis", f"trained on frozen basis {update.basis!r}, this run has {spec.basis!r}")
    if update.round != round:
        raise refuse("round", f"trained for round {update.round}, this is round {round}")
    if not (math.isfinite(update.weight) and 0.0 < update.weight <= spec.max_weight):
        raise refuse("weight", f"got weight {update.weight}, expected above 0 and at most {spec.max_weight}")
    expected = set(spec.leaves if names is None else names)
    if set(update.leaves) != expected:
        missing, unknown = sorted(expected - set(update.leaves)), sorted(set(update.leaves) - expected)
        raise refuse("schema", f"missing leaves {missing}, unknown leaves {unknown}")
    _check_shapes(update, spec, ranks)
    if values:
        square = math.fsum(
            _check_values(n, leaf, spec.max_abs, update.client) for n, leaf in update.leaves.items()
        )
        if spec.max_norm is not None and square > spec.max_norm**2:
            raise refuse(
                "norm", f"norm of all leaves is {math.sqrt(square):.6g}, bound is {spec.max_norm:.6g}"
            )
    if update.fisher is not None:
        _check_fisher(update, values)
    elif needs_fisher:
        raise refuse("fisher", "no Fisher information was sent, and the rule needs it")


def _check_shapes(update: Update, spec: Spec, ranks: Mapping[str, int] | None) -> None:
    axes = spec.rank_axes()
    seen: dict[str, int] = {}
    for name, leaf in update.leaves.items():
        want = spec.leaves[name]
        if leaf.dtype != want.dtype:
            raise Refusal("schema", f"leaf {name} is {leaf.dtype}, expected {want.dtype}", update.client)
        if name not in axes:
            if tuple(leaf.shape) != want.shape:
                raise Refusal(
                    "schema", f"leaf {name} is {tuple(leaf.shape)}, expected {want.shape}", update.client
                )
            continue
        site, axis = axes[name]
        if leaf.ndim != 2 or leaf.shape[1 - axis] != want.shape[1 - axis]:
            raise Refusal(
                "schema", f"leaf {name} is {tuple(leaf.shape)}, expected {want.shape}", update.client
            )
        rank = int(leaf.shape[axis])
        if seen.setdefault(site, rank) != rank:
            raise Refusal(
                "rank", f"the factors of site {site} have ranks {seen[site]} and {rank}", update.client
            )
        if spec.rank_limit is None and rank != want.shape[axis]:
            raise Refusal("rank", f"site {site} has rank {rank}, expected {want.shape[axis]}", update.client)
        if spec.rank_limit is not None and not 1 <= rank <= spec.rank_limit:
            raise Refusal(
                "rank", f"site {site} has rank {rank}, expected 1 to {spec.rank_limit}", update.client
            )
        if ranks is not None and ranks.get(site, rank) != rank:
            raise Refusal(
                "rank", f"site {site} had rank {ranks[site]} before and has {rank} now", update.client
            )
    for site, scale in update.scales.items():
        if site not in spec.products:
            raise Refusal("scale", f"a scale for {site!r}, which is no product site", update.client)
        if not math.isfinite(scale) or scale == 0.0:
            raise Refusal("scale", f"site {site} has scale {scale}, expected finite and not 0", update.client)


def _check_values(name: str, leaf: Tensor, bound: float, client: str) -> float:
    """Refuse values that are not finite or above the bound. Returns the sum of squares of the leaf."""
    flat = leaf.detach().reshape(-1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    square = float(torch.dot(flat, flat))
    # The sum of squares is one fast pass and bounds every element, so the common case needs nothing else. It may
    # overflow on large but finite values: then look at the elements themselves.
    if square <= bound * bound:
        return square
    top = float(flat.abs().max()) if flat.numel() else 0.0
    if not math.isfinite(top):
        raise Refusal("nonfinite", f"leaf {name} holds NaN or infinity", client)
    if top > bound:
        raise Refusal("norm", f"leaf {name} holds {top:.6g}, bound on absolute values is {bound:.6g}", client)
    return square


def _check_fisher(update: Update, values: bool) -> None:
    assert update.fisher is not None
    if set(update.fisher) != set(update.leaves):
        raise Refusal("fisher", "the Fisher's leaves are not the update's leaves", update.client)
    for name, fisher in update.fisher.items():
        if fisher.shape != update.leaves[name].shape or not fisher.dtype.is_floating_point:
            raise Refusal(
                "fisher",
                f"Fisher of {name} is {tuple(fisher.shape)} {fisher.dtype}, "
                f"expected {tuple(update.leaves[name].shape)} floating",
                update.client,
            )
        if values and math.isnan(nonnegative_sum(fisher)):
            raise Refusal(
                "fisher",
                f"Fisher of {name} is negative or not finite; it is a mean of squares",
                update.client,
            )
