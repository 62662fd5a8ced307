"""What the simulated clients of `fednano.federation.faults` do: who misbehaves, and what they send."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fednano.errors import FednanoError
from fednano.federation.faults import Fault
from fednano.federation.messages import Reply
from fednano.training.seeds import generator

__all__ = ["Vanished", "assign", "distort", "falsify"]


class Vanished(FednanoError):
    """A simulated client that does not answer."""


def assign(faults: Sequence[Fault], names: Sequence[str], *, seed: int, round_number: int) -> dict[str, str]:
    """Who misbehaves how in a round: client name to the fault, as text for the request.

    Args:
        faults: from `parse_faults`.
        names: of all clients.
        seed: of the run.
        round_number: counted from 1; of account for ``vanish`` alone.
    """
    ordered = sorted(names)
    shuffled = [ordered[int(k)] for k in generator(seed, "faults").permutation(len(ordered))]
    told: dict[str, str] = {}
    for fault in faults:
        if fault.kind == "vanish":
            count = round(fault.amount * len(ordered))
            drawn = generator(seed, "vanish", round_number).choice(len(ordered), size=count, replace=False)
            told |= {ordered[int(k)]: str(fault) for k in drawn}
        else:
            told = {client: str(fault) for client in shuffled[: int(fault.amount)]} | told
            shuffled = shuffled[int(fault.amount) :]
    return told


def distort(
    fault: Fault, trained: Mapping[str, Tensor], started: Mapping[str, Tensor], draw: torch.Generator
) -> dict[str, Tensor]:
    """The leaves that a misbehaving client reports, before any codec.

    Args:
        fault: what it does.
        trained: the leaves that it has trained.
        started: the leaves that it was sent, of the same names and shapes.
        draw: its randomness.
    """
    out = {}
    for name, leaf in trained.items():
        change = leaf - started[name]
        if fault.kind == "sign-flip":
            out[name] = started[name] - fault.strength * change
        elif fault.kind == "noise":
            noise = torch.randn(leaf.shape, generator=draw).to(leaf)
            length = float(change.norm()) / max(float(noise.norm()), 1e-30)
            out[name] = started[name] + fault.strength * length * noise
        elif fault.kind in ("nan", "huge"):
            out[name] = torch.full_like(leaf, math.nan if fault.kind == "nan" else 1e30)
        else:
            out[name] = leaf
    return out


def falsify(fault: Fault, reply: Reply) -> Reply:
    """The reply of a misbehaving client."""
    if fault.kind == "stale":
        return replace(reply, round=reply.round - 1)
    if fault.kind == "foreign":
        return replace(reply, facts=reply.facts | {"edge": "0" * 64})
    return reply
