"""A round under secure aggregation: four exchanges over the Message API, and a merge of which the server sees the sum.

The clients that take part give keys, then shares of their secrets, then train and send masked updates, then reveal what
is needed to unmask the sum. Who fails at any point is left out, as long as enough are left; else the round merges
nothing and the adapters stay as they were.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fednano.aggregation import Refusal, Rule, layout_of, read_sum
from fednano.aggregation.chunks import U64
from fednano.errors import ConfigError
from fednano.federation.asking import ask, instruct, sample_clients
from fednano.federation.config import RunConfig
from fednano.federation.exchange import Delivery, exchange
from fednano.federation.ledger import record_client
from fednano.federation.messages import HostTicket, Instruction, record_bytes
from fednano.federation.phase import Federation, Merge, PhaseResult, WireTotals
from fednano.federation.secure_client import LOSS, spec_to_json, unpacked
from fednano.federation.uplink import PLAIN
from fednano.privacy.secagg import BelowThreshold, ProtocolError, Server
from fednano.privacy.secagg.keys import Public

__all__ = ["check_secure", "merge_securely"]


def check_secure(config: RunConfig, gathers: bool) -> None:
    """Refuse settings under which the server would need, or get, single clients' updates.

    Args:
        config: the run's settings.
        gathers: whether the adapters' basis is made from clients' gradients.

    Raises:
        ConfigError: with the reason.
    """
    if not config.secure_aggregation:
        return
    taking_part = config.participants(config.clients)
    for applies, reason in (
        (taking_part < 2, f"it needs at least 2 clients in a round, and {taking_part} takes part"),
        (
            config.codec != PLAIN,
            f"codec {config.codec!r} rounds each update by itself, and what is masked must add up; set {PLAIN!r}",
        ),
        (
            config.late != "drop",
            "an update masked for one round cannot be added in another; set late to 'drop'",
        ),
        (config.baselines, "baselines show the server what clients train alone; leave them out"),
        (
            gathers,
            f"adapter {config.adapter!r} takes its basis from gradients that clients send in the clear; choose another",
        ),
    ):
        if applies:
            raise ConfigError(f"secure-aggregation: {reason}.")


def merge_securely(
    fed: Federation, phase: str, rule: Rule, number: int, result: PhaseResult, wire: WireTotals
) -> Merge:
    """One round. Arguments as `rounds.run_rounds` has them."""
    config = fed.config
    chosen = sample_clients(config, list(fed.nodes), number, config.over_select)
    merge = Merge(rule.init(fed.spec, current=result.leaves, memory=result.memory, round=number))
    fed.view.round_started(number, chosen)
    layout = layout_of(rule, fed.spec, result.leaves, round=number, extra=(LOSS,))
    session = _Round(fed, phase, number, wire, merge, Server(layout.length, config.secure_threshold))
    try:
        session.keys(chosen)
        session.shares()
        session.updates(instruct(fed, phase, rule, number, result, list(session.clients)))
        session.reveal()
        rest = read_sum(layout, session.server.total(), rule, merge.state, session.merged())
    except (BelowThreshold, ProtocolError, Refusal) as error:
        reason = f"secure aggregation, round {number}: {error} Nothing was added up."
        merge.failures["secure aggregation"] = reason
        fed.view.message(reason, "warning")
        fed.folder.append_event("warning", reason)
        return merge
    merge.merged = dict.fromkeys(session.merged(), number)
    weight = float(merge.state.weight)
    if config.dp == "off":  # a sum of losses is no part of what noise covers
        merge.losses.append(("all together", rest[LOSS] / weight, weight))
    return merge


class _Round:
    """One session over Flower's messages."""

    def __init__(
        self, fed: Federation, phase: str, number: int, wire: WireTotals, merge: Merge, server: Server
    ) -> None:
        self.fed, self.phase, self.number, self.wire = fed, phase, number, wire
        self.merge, self.server = merge, server
        self.clients: dict[str, int] = {}
        """Name to number in the session, of those that are still in it."""

    def merged(self) -> list[str]:
        """Names of the clients whose updates are in the sum."""
        inside = set(self.server.merged)
        return sorted(name for name, index in self.clients.items() if index in inside)

    def keys(self, chosen: list[str]) -> None:
        """First exchange."""
        for name, tensors in self._exchange("keys", {name: {} for name in chosen}):
            blob = tensors.get("keys", torch.zeros(0, dtype=torch.uint8))
            try:
                public = Public.from_bytes(blob.numpy().tobytes())
                self.clients[name] = self.server.admit(public)
            except ProtocolError as error:
                self._fail(name, str(error))
        plan = self.server.connect()
        self.fed.folder.append_event(
            "info",
            f"{self.phase}, round {self.number}: secure aggregation of {plan.clients} clients, each with {plan.degree} "
            f"neighbours; {plan.threshold} of {plan.degree + 1} shares and {plan.least} clients are needed.",
        )

    def shares(self) -> None:
        """Second exchange."""
        assert self.server.plan is not None
        asked = {}
        for name, index in self.clients.items():
            near = self.server.neighbours(index)
            keys = b"".join(public.to_bytes() for public in near.values())
            asked[name] = {"index": index, "neighbours": list(near), "keys": keys}
            asked[name]["threshold"] = self.server.plan.threshold
        for name, tensors in self._exchange("shares", asked):
            try:
                self.server.shared(self.clients[name], unpacked(tensors))
            except ProtocolError as error:
                self._fail(name, str(error))
        self.clients = {n: i for n, i in self.clients.items() if n not in self.merge.failures}

    def updates(self, instructions: Mapping[str, Instruction]) -> None:
        """Third exchange: the clients train."""
        fed, spec = self.fed, spec_to_json(self.fed.spec)
        instructions = {
            name: replace(
                told,
                secure={
                    "stage": "masked",
                    "session": self.server.session,
                    "active": self.server.active(self.clients[name]),
                    "spec": spec,
                    "least": self.server.plan.least if self.server.plan else 0,
                },
            )
            for name, told in instructions.items()
        }
        wanted = fed.config.participants(len(fed.nodes)) if fed.config.over_select else len(instructions)
        deliveries = ask(fed, self.phase, self.number, instructions, self.wire)
        for delivery in deliveries:
            reason = self._take(delivery)
            if reason is not None:
                self.merge.failures[delivery.client] = reason
            record_client(fed, self.phase, self.number, delivery, reason)
            if len(self.server.merged) >= wanted:
                break  # who is still training counts as dropped out
        deliveries.close()
        self.server.require()

    def _take(self, delivery: Delivery) -> str | None:
        """Add a masked update. Returns why it cannot be."""
        reply, fed = delivery.reply, self.fed
        if reply.failure is not None:
            return f"{reply.failure.kind}: {reply.failure.message}"
        expected = {"spec": fed.spec.spec, "basis": fed.spec.basis, "edge": fed.edge}
        if fed.config.own_ranks:  # each rank has its own; clients check the shapes
            del expected["spec"], expected["basis"]
        for name, here in expected.items():
            if here and reply.facts.get(name) != here:
                return f"trained with {name} {str(reply.facts.get(name))[:16]!r}, this run has {here[:16]!r}"
        if reply.round != self.number:
            return f"trained for round {reply.round}, this is round {self.number}"
        words = (reply.leaves or {}).get("masked")
        if words is None or words.dtype != torch.int64:
            return "the reply carries no masked update of 64-bit words"
        vector: U64 = words.numpy().view(np.uint64)
        try:
            self.server.add(self.clients[delivery.client], vector)
        except ProtocolError as error:
            return str(error)
        return None

    def reveal(self) -> None:
        """Last exchange."""
        asked = {}
        for name in self.merged():
            index = self.clients[name]
            received = self.server.received(index)
            asked[name] = {
                "survivors": self.server.survivors(index),
                "senders": list(received),
                "sealed": list(received.values()),
            }
        for name, tensors in self._exchange("reveal", asked):
            try:
                self.server.revealed(self.clients[name], unpacked(tensors))
            except ProtocolError as error:
                self._tell(name, str(error))

    def _exchange(
        self, stage: str, asked: Mapping[str, Mapping[str, Any]]
    ) -> Generator[tuple[str, dict[str, torch.Tensor]]]:
        """Ask clients for an answer that needs no training; yield what comes, and note who failed."""
        fed = self.fed
        requests = {}
        for name, secure in asked.items():
            told = Instruction(
                *(fed.config, self.phase, self.number, HostTicket(), False, {}, {}),
                run=fed.folder.id,
                secure={"stage": stage, "session": self.server.session, **secure},
            )
            content = told.to_records()
            requests[name] = (fed.nodes[name], content)
            self.wire.adapter_down += record_bytes(content)
        for delivery in exchange(
            fed.grid,
            requests,
            message_type="query.secure",
            group=f"{self.phase}-{self.number}-{stage}",
            timeout=fed.config.round_timeout,
            stop=fed.stop,
            number=self.number,
        ):
            self.wire.adapter_up += delivery.bytes_up
            failure = delivery.reply.failure
            if failure is None and delivery.reply.leaves is not None:
                yield delivery.client, delivery.reply.leaves
                continue
            reason = f"{failure.kind}: {failure.message}" if failure else "the reply is empty"
            if stage == "reveal":
                self._tell(delivery.client, reason)
            else:
                self._fail(delivery.client, reason)
                record_client(fed, self.phase, self.number, delivery, reason)

    def _fail(self, name: str, reason: str) -> None:
        self.merge.failures[name] = reason
        self._tell(name, reason)

    def _tell(self, name: str, reason: str) -> None:
        """A client that leaves after its masked update was added is merged all the same."""
        self.fed.folder.append_event("warning", f"{self.phase}, round {self.number}, {name}: {reason}")
