"""A client's side of a session: four answers, each given once.

The state between two messages is one small JSON object, `Client.to_json`, because Flower starts a process per message.
It holds the client's secrets of the session: keep it private, store it before the answer leaves, and delete it after
the last.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fednano.privacy.secagg.errors import BelowThreshold, ProtocolError
from fednano.privacy.secagg.graph import threshold_of
from fednano.privacy.secagg.keys import Public, Secrets, agree, derive, opened, sealed
from fednano.privacy.secagg.ring import U64, add_mask
from fednano.privacy.secagg.shamir import SHARE_BYTES, read, split

__all__ = ["Client", "pair_key", "self_key"]


def pair_key(private: X25519PrivateKey, public: bytes, session: bytes) -> bytes:
    """The key of the mask between two clients, from the private key of either and the public one of the other."""
    return agree(private, public, session, b"pair mask")


def self_key(seed: bytes, session: bytes) -> bytes:
    """The key of a client's own mask."""
    return derive(seed, session, b"self mask")


@dataclass
class Client:
    """One client in one session.

    Attributes:
        session: identifies the session, 16 bytes or more.
        master: 32 random bytes; all of the client's secrets come from them.
        index: the client's number in the session.
        threshold: t.
        neighbours: number of each neighbour to its public keys.
        active: the neighbours with whom it has masks.
        done: how many of the four answers were given.
    """

    session: bytes
    master: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    index: int = -1
    threshold: int = 0
    neighbours: dict[int, Public] = field(default_factory=dict)
    active: list[int] = field(default_factory=list)
    done: int = 0

    def keys(self) -> Public:
        """First answer: public keys."""
        self._turn(0, "keys")
        return Secrets.of(self.master, self.session).public(self.session)

    def shares(self, index: int, neighbours: Mapping[int, Public], threshold: int) -> dict[int, bytes]:
        """Second answer: the shares of its secrets, encrypted for each neighbour.

        Args:
            index: its own number.
            neighbours: number to public keys.
            threshold: t, over the neighbours and itself.

        Raises:
            ProtocolError: the threshold is not more than half, two clients have the same keys, or it is not the time.
        """
        if index < 0 or index in neighbours or min(neighbours, default=0) < 0:
            raise ProtocolError(f"client {index} cannot have the neighbours {sorted(neighbours)[:5]}.")
        holders = len(neighbours) + 1
        if not threshold_of(holders, 0.0) <= threshold <= holders:
            raise ProtocolError(
                f"threshold {threshold} of {holders} holders; expected more than half of them."
            )
        own = Secrets.of(self.master, self.session)
        known = [own.public(self.session), *neighbours.values()]
        if len({key for public in known for key in (public.channel, public.mask)}) != 2 * len(known):
            raise ProtocolError("two clients have the same public key: somebody is counted twice.")
        self._turn(1, "shares")
        self.index, self.threshold, self.neighbours = index, threshold, dict(neighbours)
        numbers = sorted(neighbours)
        pieces = self._split(own, numbers)
        return {
            v: sealed(piece, own.channel, neighbours[v].channel, self.session, index, v)
            for v, piece in zip(numbers, pieces, strict=True)
        }

    def mask(self, vector: U64, active: Collection[int]) -> U64:
        """Third answer: the vector behind all its masks.

        Args:
            vector: ``(length,)`` words; not changed.
            active: the neighbours that gave the second answer.

        Raises:
            BelowThreshold: too few of them to recover anything from.
            ProtocolError: strangers among them, or it is not the time.
        """
        strangers = sorted(set(active) - set(self.neighbours))
        if strangers:
            raise ProtocolError(f"asked to mask with {strangers[:5]}, which are no neighbours.")
        if len(set(active)) + 1 < self.threshold:
            raise BelowThreshold(
                f"{len(set(active)) + 1} holders of this client's shares are left, {self.threshold} are needed."
            )
        self._turn(2, "masked")
        self.active = sorted(set(active))
        own = Secrets.of(self.master, self.session)
        masked = vector.astype(np.uint64, copy=True)
        add_mask(masked, self_key(own.seed, self.session), 1)
        for v in self.active:
            key = pair_key(own.mask, self.neighbours[v].mask, self.session)
            add_mask(masked, key, 1 if self.index < v else -1)
        return masked

    def reveal(self, survivors: Collection[int], received: Mapping[int, bytes]) -> dict[int, bytes]:
        """Last answer: one share for each active neighbour and itself.

        Args:
            survivors: those of them whose masked vectors were added up, itself included.
            received: the neighbours' encrypted shares.

        Returns:
            Number to share, 33 bytes: of the seed of a survivor, of the private key of anybody else. A neighbour whose
            message cannot be read is left out.

        Raises:
            BelowThreshold: fewer survivors than the threshold.
            ProtocolError: strangers among them, it is not one itself, or it is not the time.
        """
        alive = set(survivors)
        strangers = sorted(alive - {*self.active, self.index})
        if strangers or self.index not in alive:
            raise ProtocolError(
                f"told that {sorted(alive)[:5]} survive; expected some of its active neighbours, and itself."
            )
        if len(alive) < self.threshold:
            raise BelowThreshold(
                f"{len(alive)} of this client's neighbourhood survive, {self.threshold} are needed."
            )
        self._turn(3, "reveal")
        own = Secrets.of(self.master, self.session)
        (mine,) = self._split(own, [self.index])
        shares = {self.index: mine[SHARE_BYTES:]}
        for v in self.active:
            try:
                plain = opened(
                    *(received.get(v, b""), own.channel, self.neighbours[v].channel, self.session),
                    sender=v,
                    receiver=self.index,
                )
                if len(plain) != 2 * SHARE_BYTES:
                    raise ProtocolError(f"client {v} sent {len(plain)} bytes, expected two shares.")
                share = plain[SHARE_BYTES:] if v in alive else plain[:SHARE_BYTES]
                read(share)
            except ProtocolError:
                continue  # others hold shares of the same secrets
            shares[v] = share
        return shares

    def to_json(self) -> dict[str, Any]:
        """What must survive between two messages."""
        return {
            "session": self.session.hex(),
            "master": self.master.hex(),
            "index": self.index,
            "threshold": self.threshold,
            "neighbours": {str(v): public.to_bytes().hex() for v, public in self.neighbours.items()},
            "active": self.active,
            "done": self.done,
        }

    @classmethod
    def from_json(cls, value: Any) -> Client:
        """Inverse of `to_json`. Raises ProtocolError for anything else."""
        try:
            return cls(
                session=bytes.fromhex(value["session"]),
                master=bytes.fromhex(value["master"]),
                index=int(value["index"]),
                threshold=int(value["threshold"]),
                neighbours={
                    int(v): Public.from_bytes(bytes.fromhex(blob)) for v, blob in value["neighbours"].items()
                },
                active=[int(v) for v in value["active"]],
                done=int(value["done"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(
                f"this client's state of a secure aggregation is damaged: {error}."
            ) from error

    def _turn(self, number: int, name: str) -> None:
        if self.done != number:
            raise ProtocolError(
                f"asked for exchange {number + 1} ({name}) of secure aggregation after {self.done} answers; each is "
                "given once, in order."
            )
        self.done += 1

    def _split(self, own: Secrets, holders: list[int]) -> list[bytes]:
        """The shares of the private key and of the seed, end to end, for each holder; the same at every call."""
        first, second = own.coefficients(self.session, self.threshold - 1)
        points = [holder + 1 for holder in holders]
        keys, seeds = split(own.mask.private_bytes_raw(), first, points), split(own.seed, second, points)
        return [key + seed for key, seed in zip(keys, seeds, strict=True)]
