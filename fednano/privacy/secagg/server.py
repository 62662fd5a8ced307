"""The server's side of a session: it draws the graph, adds masked vectors as they come, and takes the masks off the
sum."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fednano.privacy.secagg.client import pair_key, self_key
from fednano.privacy.secagg.errors import BelowThreshold, ProtocolError
from fednano.privacy.secagg.graph import Plan, neighbourhoods, plan
from fednano.privacy.secagg.keys import Public, commitment, public_of
from fednano.privacy.secagg.ring import U64, add_mask
from fednano.privacy.secagg.shamir import recover

__all__ = ["Server"]


class Server:
    """One session.

    Clients are numbered in the order in which `admit` takes them. Memory: one vector, and about 100 bytes an edge of
    the graph, whatever the vectors' length.

    Args:
        length: words of each vector.
        share: of the clients that must be left at the end, see `plan`.
    """

    def __init__(self, length: int, share: float) -> None:
        self.session = secrets.token_bytes(16)
        self.length, self.share = length, share
        self.plan: Plan | None = None
        self._publics: list[Public] = []
        self._graph: list[list[int]] = []
        self._sealed: dict[int, dict[int, bytes]] = {}
        self._total = np.zeros(length, np.uint64)
        self._survivors: set[int] = set()
        self._revealed: dict[int, dict[int, bytes]] = {}

    # First exchange

    def admit(self, public: Public) -> int:
        """Take a client's keys; returns its number.

        Raises:
            ProtocolError: somebody else has the same keys, or the graph is drawn already.
        """
        if self.plan is not None:
            raise ProtocolError("the neighbours are chosen already; this client is too late for the session.")
        if any({public.channel, public.mask} & {other.channel, other.mask} for other in self._publics):
            raise ProtocolError("another client has sent the same public keys.")
        self._publics.append(public)
        return len(self._publics) - 1

    def connect(self) -> Plan:
        """Choose the neighbours of all that were admitted.

        Raises:
            BelowThreshold: fewer than two clients.
        """
        count = len(self._publics)
        if count < 2:
            raise BelowThreshold(f"{count} clients can take part; secure aggregation needs at least 2.")
        self.plan = plan(count, self.share)
        draw = np.random.Generator(np.random.Philox(secrets.randbits(128)))
        self._graph = neighbourhoods(count, self.plan.degree, draw)
        return self.plan

    # Second exchange

    def neighbours(self, client: int) -> dict[int, Public]:
        """The neighbours of a client, with their keys."""
        return {v: self._publics[v] for v in self._graph[client]}

    def shared(self, client: int, sealed: Mapping[int, bytes]) -> None:
        """Take a client's encrypted shares.

        Raises:
            ProtocolError: not one for each neighbour.
        """
        if set(sealed) != set(self._graph[client]):
            raise ProtocolError("the shares are not for this client's neighbours, one each.")
        self._sealed[client] = dict(sealed)

    # Third exchange

    def active(self, client: int) -> list[int]:
        """The neighbours of a client that gave their shares."""
        return [v for v in self._graph[client] if v in self._sealed]

    def add(self, client: int, masked: U64) -> None:
        """Add a masked vector.

        Raises:
            ProtocolError: another length, a second vector, or a client that gave no shares.
        """
        if client not in self._sealed or client in self._survivors:
            raise ProtocolError("a masked vector that nobody waits for.")
        if masked.dtype != np.uint64 or masked.shape != (self.length,):
            raise ProtocolError(
                f"the masked vector is {masked.dtype} {masked.shape}, expected uint64 {(self.length,)}."
            )
        self._total += masked
        self._survivors.add(client)

    def require(self) -> None:
        """Raises BelowThreshold while fewer masked vectors have come than the plan wants."""
        assert self.plan is not None
        if len(self._survivors) < self.plan.least:
            raise BelowThreshold(
                f"{len(self._survivors)} of {self.plan.clients} clients sent their masked updates, "
                f"{self.plan.least} are needed (secure-threshold)."
            )

    # Last exchange

    def survivors(self, client: int) -> list[int]:
        """Those of a survivor's neighbourhood whose vectors are in the sum, itself included."""
        return [v for v in (*self._graph[client], client) if v in self._survivors]

    def received(self, client: int) -> dict[int, bytes]:
        """What the active neighbours of a client encrypted for it."""
        return {v: self._sealed[v][client] for v in self.active(client)}

    def revealed(self, client: int, shares: Mapping[int, bytes]) -> None:
        """Take a survivor's shares of its neighbours' secrets.

        Raises:
            ProtocolError: a share of somebody whose shares it does not hold.
        """
        strangers = set(shares) - {*self.active(client), client}
        if client not in self._survivors or strangers:
            raise ProtocolError(f"shares of {sorted(strangers)[:5]}, which this client does not hold.")
        for owner, share in shares.items():
            self._revealed.setdefault(owner, {})[client + 1] = share

    def total(self) -> U64:
        """The sum of the survivors' vectors modulo 2**64, ``(length,)``; once.

        Raises:
            BelowThreshold: too few survivors, or too few shares of somebody's secret.
            ProtocolError: shares that contradict what their owner committed to.
        """
        self.require()
        total, weights = self._total, dict[tuple[int, ...], list[int]]()
        self._total = np.zeros(0, np.uint64)
        for u in sorted(self._survivors):
            seed = self._secret(u, weights, of_seed=True)
            add_mask(total, self_key(seed, self.session), -1)
        for u in sorted(set(self._sealed) - self._survivors):
            partners = [v for v in self.active(u) if v in self._survivors]
            if not partners:
                continue
            private = X25519PrivateKey.from_private_bytes(self._secret(u, weights, of_seed=False))
            for v in partners:  # v had added the pair's mask if v < u
                key = pair_key(private, self._publics[v].mask, self.session)
                add_mask(total, key, -1 if v < u else 1)
        return total

    def _secret(self, owner: int, weights: dict[tuple[int, ...], list[int]], *, of_seed: bool) -> bytes:
        assert self.plan is not None
        public = self._publics[owner]

        def right(secret: bytes) -> bool:
            if of_seed:
                return commitment(secret, self.session) == public.commitment
            return public_of(X25519PrivateKey.from_private_bytes(secret)) == public.mask

        return recover(self._revealed.get(owner, {}), self.plan.threshold, right, weights)

    @property
    def merged(self) -> Sequence[int]:
        """Numbers of the clients whose vectors are in the sum."""
        return sorted(self._survivors)
