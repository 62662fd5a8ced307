"""Who is whose neighbour: a k-regular graph on a random order of the clients, with k as small as it may be.

The graph is Harary's: the clients stand on a ring in random order, and each is joined to the k/2 before and after it.
Up to some hundred clients it is complete. k and the threshold t follow from the conditions of Bell et al. (eprint
2020/704, section 3.4), each a tail of the hypergeometric distribution or a union bound, over n clients of which a share
is corrupt and another drops out:

- no honest client has t or more corrupt holders of its shares, nor is the ring of honest survivors cut by k/2 corrupt
  or missing clients in a row: with probability 1 - 2**-40;
- each client keeps t holders that answer: with probability 1 - 2**-30.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fednano.errors import ConfigError

__all__ = ["Plan", "neighbourhoods", "plan"]

_SECRECY, _DELIVERY = 40, 30  # bits of the two probabilities


@dataclass(frozen=True)
class Plan:
    """The numbers of one session.

    Attributes:
        clients: n, that take part in the first exchange.
        degree: k, neighbours of a client. It holds a share of its own secrets, too, so there are k + 1 holders.
        threshold: t, holders that must answer; more than half of them.
        least: clients that must be left at the end, or the session fails.
    """

    clients: int
    degree: int
    threshold: int
    least: int


def plan(clients: int, share: float) -> Plan:
    """The sparsest graph that serves.

    Args:
        clients: n, at least 2.
        share: of the clients that must be left; also of the holders of a secret. Above 0.5 and at most 1.

    Where the graph is complete, any clients may be lost as long as ``share`` of all are left, and fewer than t holders
    that collude learn nothing. Where it is sparse, that holds with the probabilities above if at most half of ``1 -
    share`` drop out and at most half of ``share`` are corrupt.

    Raises:
        ConfigError: fewer than 2 clients, or a share out of its range.
    """
    if clients < 2:
        raise ConfigError(f"secure aggregation needs at least 2 clients in a round, got {clients}.")
    if not 0.5 < share <= 1.0:
        raise ConfigError(f"secure-threshold is {share}; expected a number above 0.5 and at most 1.")
    corrupt, lost = int(clients * share / 2), int(clients * (1 - share) / 2)
    low, high = 2, clients - 1  # from here on the graph is complete
    while low < high and clients > 2:  # the conditions ease as k grows, but for rounding
        middle = (low + high) // 2
        if _serves(clients, middle - middle % 2, share, corrupt, lost):
            high = middle
        else:
            low = middle + 1
    # A few edges less than all would give up certainty for nothing.
    degree = high - high % 2 if high < 0.9 * (clients - 1) else clients - 1
    return Plan(clients, degree, threshold_of(degree + 1, share), threshold_of(clients, share))


def threshold_of(holders: int, share: float) -> int:
    """``share`` of the holders, rounded up, and always more than half of them."""
    return min(holders, max(holders // 2 + 1, math.ceil(holders * share - 1e-9)))


def _serves(clients: int, degree: int, share: float, corrupt: int, lost: int) -> bool:
    from scipy.stats import hypergeom

    if degree < 2:
        return False
    need = threshold_of(degree + 1, share)
    union = math.log2(clients)
    cut = union + degree / 2 * math.log2((corrupt + lost) / clients)
    taken = union + _bits(hypergeom.logsf(need - 1, clients - 1, corrupt, degree))
    missing = union + _bits(hypergeom.logsf(degree + 1 - need, clients - 1, lost, degree))
    return max(cut, taken) <= -(_SECRECY + 1) and missing <= -_DELIVERY


def _bits(natural: float) -> float:
    return float(natural) / math.log(2.0)


def neighbourhoods(clients: int, degree: int, random: np.random.Generator) -> list[list[int]]:
    """The neighbours of each client, sorted.

    Args:
        clients: n.
        degree: k: even, or n - 1.
        random: decides the order on the ring.
    """
    if degree >= clients - 1:
        return [[v for v in range(clients) if v != u] for u in range(clients)]
    ring = random.permutation(clients)
    found: list[list[int]] = [[] for _ in range(clients)]
    steps = [step for half in range(1, degree // 2 + 1) for step in (half, -half)]
    for place, u in enumerate(ring):
        found[int(u)] = sorted(int(ring[(place + step) % clients]) for step in steps)
    return found
