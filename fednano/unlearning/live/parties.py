"""The parties of a job that are reached through Flower: SuperNodes that are connected now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from fednano import errors
from fednano.aggregation import Update
from fednano.errors import ConfigError, DataError, FednanoError, Interrupted, RunError
from fednano.federation.config import RunConfig
from fednano.federation.deployment import Deployment, sent_bytes
from fednano.federation.exchange import Delivery
from fednano.federation.messages import HostTicket, Instruction
from fednano.federation.model import load_data
from fednano.models.edge import NanoEdge
from fednano.runs.tombstones import Tombstones
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.unlearning.jobs.runner import OwnerOffline
from fednano.unlearning.live.ask import NAME, Ask, Forget
from fednano.unlearning.local import LocalResult
from fednano.unlearning.measure import Measurement, SetScores, SiteMeasurement
from fednano.unlearning.methods import Method
from fednano.unlearning.outcome import UnlearnRequest
from fednano.unlearning.parties import Contribution, RoundPlan, looks_back, owner_weight, settings_of
from fednano.unlearning.probes import is_back
from fednano.unlearning.retrain import Retrained
from fednano.unlearning.sites import some
from fednano.unlearning.start import APPROXIMATE, EXACT, Rows, rows_from_sums
from fednano.unlearning.workspace import Probe, utility_of

__all__ = ["LiveParties", "LiveScope"]

_AWAY = frozenset({"Timeout", "ClientCrashed", "NodeLost", "HostUnavailable"})


@dataclass(frozen=True)
class LiveScope:
    """What the owner says of its scope.

    Attributes:
        forget: samples to forget that were trained on.
        first: the first round that trained on one of them; ``None``: none did.
        ignored: samples that are named, but that no round has trained on.
    """

    forget: int
    first: int | None
    ignored: int


class LiveParties:
    """See `fednano.unlearning.parties.Parties`.

    Args:
        deployment: the connected clients.
        request: how to unlearn; its ``samples`` are empty, since only the owner knows them.
        method: by which method.
        forget: what the owner is told.
        stop: asked before each round.
    """

    def __init__(
        self,
        deployment: Deployment,
        request: UnlearnRequest,
        method: Method,
        forget: Forget,
        stop: Callable[[], bool],
    ) -> None:
        self._live, self._request, self._method = deployment, request, method
        self._forget, self._stop = forget, stop
        self._leaves, _ = deployment.folder.load_adapter()
        self._absent: set[str] = set()
        self._messages = 0
        self.statement: dict[str, Any] = {}
        tests = some(list(load_data(self.config, "test")), request.seed, "test")
        self._tests = ClientData(tests, self.edge, FeatureCache(self.edge.edge))
        if request.client not in deployment.nodes:
            raise OwnerOffline(f"{request.client} is not connected.")

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self._live.config

    @property
    def edge(self) -> NanoEdge:
        """The server's NanoEdge."""
        return self._live.edge

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The run's adapter."""
        return self._leaves

    @property
    def notes(self) -> list[str]:
        """Who did not take part."""
        if not self._absent:
            return []
        everybody = len(self._live.nodes)
        return [f"retaining: {len(self._absent)} of {everybody} clients missed a round"]

    def scope(self) -> LiveScope:
        """What the owner has to forget.

        Raises:
            OwnerOffline: it does not answer.
            RequestRefused: it has not signed the request, or does not hold the samples.
        """
        owner = self._request.client
        (reply,) = self._all("query", "scope", self._leaves, [owner]).values()
        figures = reply.reply.metrics
        return LiveScope(int(figures["forget"]), int(figures["first"]) or None, int(figures["ignored"]))

    def measure(self, leaves: Mapping[str, Tensor]) -> Measurement:
        """Everything about an adapter of the run's kind: the owner's figures, the server's, and each client's."""
        replies = self._all("query", "measure", leaves, list(self._live.nodes), sign=True)
        owner = replies[self._request.client].reply
        site = SiteMeasurement.from_json(_json(owner.facts, "figures"))
        self.statement = _json(owner.facts, "statement") if "statement" in owner.facts else {}
        clients = {
            name: each.reply.metrics["held-out"]
            for name, each in sorted(replies.items())
            if "held-out" in each.reply.metrics
        }
        utility, accuracy = self._utility(leaves)
        return Measurement(
            site.forget, site.retain, site.unseen, utility, accuracy, clients, site.attacks, site.priv_leak
        )

    def probe(self, leaves: Mapping[str, Tensor]) -> Probe:
        """What is looked at after each round: the forget set at its owner, the utility here."""
        (reply,) = self._all("query", "probe", leaves, [self._request.client]).values()
        return Probe(_scores(_json(reply.reply.facts, "figures")), *self._utility(leaves))

    def earlier(self, leaves: Mapping[str, Tensor], forgotten: Tombstones) -> dict[str, Any]:
        """What an adapter knows of what earlier jobs forgot: job to figures, ``None`` where its owner cannot tell."""
        owners = sorted({each.site for each in forgotten.sets} & set(self._live.nodes))
        asked = {
            owner: Instruction(self.config, NAME, 0, HostTicket(), False, {}, dict(leaves))
            for owner in owners
        }
        figures: dict[str, float] = {}
        for delivery in self._live.ask(asked, message_type="query.resurfaced", group=f"{NAME}-earlier"):
            if delivery.reply.failure is None:
                figures |= delivery.reply.metrics
        found: dict[str, Any] = {}
        for each in forgotten.sets:
            value, count = figures.get(each.job), int(figures.get(f"{each.job}/samples", 0))
            found[each.job] = None
            if value is not None and each.level is not None:
                found[each.job] = {
                    "samples": count,
                    "exact_memorisation": value,
                    "level": each.level,
                    "back": is_back(value, each.level, count),
                }
        return found

    def rows(self) -> Rows:
        """FILA's row weights: from the owner alone where it keeps samples, else with everybody's row sums."""
        owner = self._request.client
        (mine,) = self._all("query", "fisher", self._leaves, [owner]).values()
        assert mine.reply.leaves is not None
        seconds = mine.reply.metrics["seconds"]
        if not mine.reply.metrics["sums"]:
            return Rows(mine.reply.leaves, EXACT, seconds)
        others = [name for name in self._live.nodes if name != owner]
        replies = self._all("query", "fisher", self._leaves, others)
        if not replies:
            raise RunError("no client that keeps samples answers; FILA needs a Fisher of retained data.")
        sums = [each.reply.leaves or {} for _, each in sorted(replies.items())]
        seconds += sum(each.reply.metrics["seconds"] for each in replies.values())
        return Rows(rows_from_sums(mine.reply.leaves, sums), APPROXIMATE, seconds)

    def round(self, plan: RoundPlan) -> list[Contribution]:
        """One round; the owner must answer, others may be missing."""
        if self._stop():
            raise Interrupted(f"unlearning was asked to end in round {plan.number}.")
        extra = {f"moving/{name}": value.to(torch.uint8) for name, value in plan.moving.items()}
        origin = {f"origin/{name}": leaf for name, leaf in plan.origin.items()}
        names = list(self._live.nodes)
        owner = self._request.client
        told = {
            name: extra | (origin if name == owner and looks_back(self._method) else {}) for name in names
        }
        replies = self._all("train", "train", plan.leaves, names, number=plan.number, extra=told)
        done = []
        for name, each in sorted(replies.items()):
            reply, figures = each.reply, each.reply.metrics
            update = Update(
                client=name,
                round=plan.number,
                weight=owner_weight(len(replies)) if name == owner else 1.0,
                leaves=reply.leaves or {},
                spec=reply.facts.get("spec", ""),
                basis=reply.facts.get("basis", ""),
            )
            result = LocalResult(
                figures.get("forget"),
                figures.get("retain"),
                int(figures["samples"]),
                int(figures["steps"]),
                figures["seconds"],
            )
            down = sent_bytes(self._instruction("train", plan.leaves, plan.number, told[name], mine=False))
            done.append(Contribution(update, result, each.leaves_bytes + down))
        return done

    def retrained(self, exposure: int) -> tuple[int, dict[str, Tensor], Iterator[Retrained]]:
        """Not offered: the clients would have to be told to forget before it is decided that they do."""
        raise ConfigError(
            "exact retraining is not done through live sites. Commit an approximate method first and start a new run "
            "with the tombstones (flwr run ... start-from), or retrain where the data is: fednano unlearn run --data."
        )

    def _utility(self, leaves: Mapping[str, Tensor]) -> tuple[float, float]:
        self.edge.load_travelling(leaves)
        return utility_of(self.edge, self._live.llm, self._tests)

    def _instruction(
        self,
        task: str,
        leaves: Mapping[str, Tensor],
        number: int,
        extra: Mapping[str, Tensor],
        *,
        mine: bool,
        sign: bool = False,
    ) -> Instruction:
        request = self._request
        ask = Ask(
            task,
            request.seed,
            settings_of(request, self.config),
            request.fisher_samples,
            self._forget if mine else None,
            sign and mine,
        )
        return Instruction(
            *(self.config, NAME, number, HostTicket(), False),
            advice=ask.to_advice(),
            leaves=dict(leaves),
            extra=dict(extra),
        )

    def _all(
        self,
        kind: str,
        task: str,
        leaves: Mapping[str, Tensor],
        names: list[str],
        *,
        number: int = 0,
        extra: Mapping[str, Mapping[str, Tensor]] | None = None,
        sign: bool = False,
    ) -> dict[str, Delivery]:
        """Ask clients; returns the replies of those that did what they were asked, by name.

        Raises:
            OwnerOffline: the owner does not answer.
            FednanoError: what the owner says is wrong.
        """
        owner = self._request.client
        asked = {
            name: self._instruction(
                task, leaves, number, (extra or {}).get(name, {}), mine=name == owner, sign=sign
            )
            for name in names
        }
        self._messages += 1
        done: dict[str, Delivery] = {}
        for delivery in self._live.ask(
            asked, message_type=f"{kind}.{NAME}", group=f"{NAME}-{self._messages}"
        ):
            failure = delivery.reply.failure
            if failure is None:
                done[delivery.client] = delivery
            elif delivery.client == owner or failure.kind == "TrainingDiverged":
                _fail(delivery.client, failure.kind, failure.message)
            else:
                self._absent.add(delivery.client)
        return done


def _fail(client: str, kind: str, message: str) -> NoReturn:
    """The error that a client had, here."""
    if kind in _AWAY:
        raise OwnerOffline(f"{client} does not answer ({message}).")
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, FednanoError) and not issubclass(known, RunError):
        raise known(f"{client} says: {message}")
    raise DataError(f"{client} says: {message}")


def _json(facts: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(facts[name])
    except (KeyError, ValueError) as error:
        raise DataError(f"a site's reply lacks its {name}: {error!r}.") from error
    return found


def _scores(body: Mapping[str, Any]) -> SetScores:
    try:
        return SetScores(**{**body, "truth_ratios": tuple(body["truth_ratios"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"a site's figures cannot be read: {error!r}.") from error
