"""Attacks of a server on the updates that clients send it: which answers a client has, and which samples it trained on.

The updates are those of the run itself: what a client does in a round is a function of the seed, so the last round is
played again from the checkpoint before it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fednano.aggregation import Update
from fednano.data import Sample
from fednano.federation.asking import advise
from fednano.federation.baselines import build_rule
from fednano.federation.client_state import ClientState
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket, Instruction
from fednano.federation.participation import contribute, train_settings
from fednano.federation.private import bounded
from fednano.federation.specification import spec_of
from fednano.federation.uplink import codec_asked, unpack_update
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.privacy.audit.finding import Finding
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.local import round_samples

__all__ = ["Client", "Replay", "labels_from_updates", "members_from_updates", "replay"]

Leaves = dict[str, Tensor]
_BATCH = 16


@dataclass(frozen=True)
class Client:
    """One client's round.

    Attributes:
        name: of the client.
        leaves: what the server decodes of its update.
        used: samples that it trained on.
        unused: samples of its own that it never trains on.
    """

    name: str
    leaves: Leaves
    used: Sequence[Sample]
    unused: Sequence[Sample]


@dataclass(frozen=True)
class Replay:
    """A round, from the leaves that all clients started from."""

    start: Leaves
    clients: list[Client]


@dataclass
class _Places:
    edge: NanoEdge
    start: Leaves


def replay(
    config: RunConfig,
    edge: NanoEdge,
    llm: LanguageModel,
    cache: FeatureCache,
    shares: Mapping[str, tuple[Sequence[Sample], Sequence[Sample]]],
    start: Leaves,
    number: int,
) -> Replay:
    """Let clients do round ``number`` again.

    Args:
        config: the run's settings.
        edge: with adapters of the run; its leaves are changed.
        llm: the language model.
        cache: of image features.
        shares: client to its samples for training and its held-out ones.
        start: the leaves before the round.
        number: the round.
    """
    rule = build_rule(config, config.rule)
    spec = spec_of(edge, config)
    advice = advise(rule, spec, config, number)
    codec = codec_asked(advice)
    clients = []
    for name, (training, held) in shares.items():
        data = ClientData(training, edge, cache)
        told = Instruction(config, "audit", number, HostTicket(), False, advice, start)
        with tempfile.TemporaryDirectory() as folder:
            memory = ClientState(Path(folder), "audit", "audit", name)
            done = contribute(
                _Places(edge, start), told, llm, data, memory, client=name, samples=config.samples
            )
        leaves = done.leaves
        if codec is not None:
            leaves = unpack_update(codec, leaves, start, rule.travelling(spec, number))
        settings = train_settings(config, advice=advice)
        order = round_samples(data, settings, seed=config.seed, client=name, round_number=number)
        used = list({index: training[index] for index in order}.values())
        clients.append(Client(name, leaves, used, held))
    return Replay(start, clients)


def views(replayed: Replay, config: RunConfig) -> dict[str, dict[str, Leaves]]:
    """What the server sees in each setting: setting to client to the change that it attributes to the client."""

    def change(leaves: Mapping[str, Tensor]) -> Leaves:
        return {name: leaf.double() - replayed.start[name].double() for name, leaf in leaves.items()}

    own = {client.name: change(client.leaves) for client in replayed.clients}
    count = len(own)
    total = {n: sum((c[n] for c in own.values()), torch.zeros(1)) / count for n in next(iter(own.values()))}
    norms = sorted(float(torch.cat([t.flatten() for t in c.values()]).norm()) for c in own.values())
    private = config.changed(dp="client", dp_clip=max(norms[count // 2], 1e-12))
    noised: dict[str, Leaves] = {}
    for client in replayed.clients:
        update = bounded(Update(client.name, 0, 1.0, client.leaves), replayed.start, private, share=1.0)
        noised[client.name] = change(update.leaves)
    return {
        f"each client's update, codec {config.codec}": own,
        f"sum of {count} updates (secure aggregation)": dict.fromkeys(own, total),
        f"each clipped to the median, noise {private.dp_noise:g} at the client": noised,
    }


def labels_from_updates(
    replayed: Replay,
    config: RunConfig,
    edge: NanoEdge,
    llm: LanguageModel,
    cache: FeatureCache,
    public: Sequence[Sample],
) -> list[Finding]:
    """Guess each client's commonest answer: the one whose gradient, on the server's samples, the change opposes most.

    Answers are compared of which the server has a sample.
    """
    by_answer: dict[str, list[Sample]] = {}
    for sample in public:
        by_answer.setdefault(sample.answer, []).append(sample)
    if len(by_answer) < 2:
        return []
    directions = {
        answer: _gradient(edge, llm, ClientData(samples[:_BATCH], edge, cache), replayed.start)
        for answer, samples in sorted(by_answer.items())
    }
    found = []
    for setting, seen in views(replayed, config).items():
        hits = 0
        for client in replayed.clients:
            score = {
                answer: -sum(float((seen[client.name][n] * g[n]).sum()) for n in seen[client.name])
                / max(sum(float(t.square().sum()) for t in g.values()), 1e-300) ** 0.5
                for answer, g in directions.items()
            }
            truth = Counter(sample.answer for sample in client.used).most_common(1)[0][0]
            hits += max(score, key=lambda answer: score[answer]) == truth
        found.append(
            Finding(
                *("answers from updates", "server with samples of its own", setting),
                *("commonest answer guessed", hits / len(replayed.clients), 1 / len(directions)),
                len(replayed.clients),
            )
        )
    return found


def members_from_updates(
    replayed: Replay, config: RunConfig, edge: NanoEdge, llm: LanguageModel, cache: FeatureCache, most: int
) -> list[Finding]:
    """Tell samples that a client trained on from others of its own, by how much the update lowers their loss."""
    from fednano.unlearning.metrics.privacy import auc

    found = []
    for setting, seen in views(replayed, config).items():
        members: list[float] = []
        others: list[float] = []
        for client in replayed.clients:
            moved = {
                n: (replayed.start[n].double() + seen[client.name][n]).float() for n in seen[client.name]
            }
            for samples, into in ((client.used, members), (client.unused, others)):
                if not samples:
                    continue
                data = ClientData(samples[:most], edge, cache)
                before = _losses(edge, llm, data, replayed.start)
                after = _losses(edge, llm, data, {**replayed.start, **moved})
                into.extend((after - before).tolist())
        if not members or not others:
            return []
        found.append(
            Finding(
                *("membership from updates", "server that has the samples", setting, "AUC"),
                *(auc(members, others), 0.5, len(members) + len(others)),
            )
        )
    return found


def _losses(edge: NanoEdge, llm: LanguageModel, data: ClientData, leaves: Leaves) -> Tensor:
    edge.load_travelling(leaves)
    parts = []
    with torch.no_grad():
        for start in range(0, len(data), _BATCH):
            batch = edge(*data.batch(list(range(start, min(start + _BATCH, len(data))))))
            parts.append(llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).double())
    return torch.cat(parts)


def _gradient(edge: NanoEdge, llm: LanguageModel, data: ClientData, leaves: Leaves) -> Leaves:
    from fednano.training.local import adapter_leaves

    edge.load_travelling(leaves)
    named = {name: leaf for name, leaf in adapter_leaves(edge).items() if leaf.requires_grad}
    batch = edge(*data.batch(list(range(len(data)))))
    loss = llm.loss(batch.embeds, batch.mask, batch.labels, images=batch.images).mean()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return {name: g.double() for name, g in zip(named, gradients, strict=True)}
