"""A client's part in one round, as the merge rule wants it: what to start from, train, send and keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fednano.errors import ConfigError
from fednano.federation.client_state import ClientState
from fednano.federation.config import RunConfig, Scalar
from fednano.federation.faults import parse_faults
from fednano.federation.messages import Instruction
from fednano.federation.misbehaviour import distort
from fednano.federation.private import charge
from fednano.federation.schedules import fit_rank
from fednano.federation.uplink import codec_asked, pack_fisher, pack_update
from fednano.models.edge import NanoEdge
from fednano.models.language import LanguageModel
from fednano.training.data import ClientData, draw
from fednano.training.fisher import empirical_fisher
from fednano.training.guard import Forgotten, guard_of
from fednano.training.local import TrainOutcome, TrainSettings, mean_loss, round_samples, train_local
from fednano.training.private import Private, sampling_of, train_private
from fednano.training.seeds import stream_seed

__all__ = ["ADVICE", "Contribution", "Places", "compose", "contribute", "own_leaves", "train_settings"]

ADVICE = frozenset(
    {
        *("fisher", "proximal_mu", "control_variates", "optimiser", "initial_loss", "frozen", "personal"),
        *("personal_adapter", "mix_samples", "mix_strength"),
        *("codec", "codec_options", "learning_rate", "fault"),
    }
)
"""What this client can do for a merge rule, beyond plain training; and how it can misbehave in a simulation."""

_OWN, _PERSONAL, _CONTROL, _CARRY = "own/", "personal/", "control/", "carry/"


class Places(Protocol):
    """What a round needs of the process that it runs in."""

    edge: NanoEdge
    start: dict[str, Tensor]
    """Leaves as the seed alone makes them: the same at every client."""


@dataclass(frozen=True)
class Contribution:
    """What a client has done in a round.

    Attributes:
        outcome: of training the adapters that are merged.
        leaves: what travels: plain leaves, or one encoded blob.
        fisher: diagonal Fisher, in the same form, or none.
        metrics: numbers that the merge rule asked for.
    """

    outcome: TrainOutcome
    leaves: dict[str, Tensor]
    fisher: dict[str, Tensor] | None
    metrics: dict[str, float]


def train_settings(
    config: RunConfig, *, samples: int | None = None, advice: Mapping[str, Scalar] | None = None
) -> TrainSettings:
    """The part of a run's settings that local training needs; a merge rule's advice goes before them.

    Raises:
        ConfigError: the rule asks for something that this client cannot do.
    """
    asked = advice or {}
    unknown = sorted(set(asked) - ADVICE)
    if unknown:
        raise ConfigError(
            f"the merge rule asks clients for {', '.join(unknown)}, which this version cannot do. Update the client, "
            "or choose another rule."
        )
    return TrainSettings(
        samples=samples or config.samples,
        batch_size=config.batch_size,
        optimizer=str(asked.get("optimiser", config.optimizer)),
        learning_rate=float(asked.get("learning_rate", config.learning_rate)),
        weight_decay=config.weight_decay,
        proximal_mu=float(asked.get("proximal_mu", config.proximal_mu)),
        clip_norm=config.clip_norm,
    )


def compose(places: Places, instruction: Instruction, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leaves that an instruction means, with residuals: what came, what is personal, and what the seed gives."""
    personal = _taken(memory, _PERSONAL)
    beside = {name: leaf for name, leaf in instruction.extra.items() if name.startswith("beside/")}
    return {**places.start, **personal, **instruction.leaves, **beside}


def own_leaves(instruction: Instruction, memory: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The personal adapter that stands beside the global one; ``None`` where the rule has none, or none yet."""
    return _taken(memory, _OWN) or None if instruction.advice.get("personal_adapter") else None


def contribute(
    places: Places,
    instruction: Instruction,
    llm: LanguageModel,
    data: ClientData,
    state: ClientState,
    *,
    client: str,
    samples: int,
    forgotten: Sequence[Forgotten] = (),
) -> Contribution:
    """Train as asked from the leaves given, remember what the next round needs, and hand over what travels.

    Args:
        places: the NanoEdge of this process.
        instruction: what the server asks.
        llm: the language model.
        data: the client's samples.
        state: the client's memory.
        client: name under which samples are drawn.
        samples: training samples of this round.
        forgotten: what the client has forgotten and still holds; its steps keep it so.

    Raises:
        ConfigError: the rule asks for something that this client cannot do.
        BudgetSpent: single samples are protected, and the round would cost more than is left.
        TrainingDiverged: a loss, a gradient or a change is not finite; the memory stays as it was.
        RunError: the memory cannot be read or written.
    """
    config, advice, edge, number = instruction.config, instruction.advice, places.edge, instruction.round
    settings = train_settings(config, samples=samples, advice=advice)
    frozen, personal = _names(advice, "frozen"), _names(advice, "personal")
    codec = codec_asked(advice)
    keeps = bool(personal or advice.get("control_variates") or advice.get("personal_adapter"))
    keeps = keeps or (codec is not None and codec.feedback)
    memory = state.load(instruction.accepted) if keeps else {}
    begin = compose(places, instruction, memory)
    fit_rank(edge, begin)
    edge.load_travelling(begin)
    started = edge.travelling()
    torch.manual_seed(stream_seed(config.seed, "train", number, client))
    metrics: dict[str, float] = {"learning-rate": settings.learning_rate}
    if advice.get("initial_loss"):
        order = round_samples(data, settings, seed=config.seed, client=client, round_number=number)
        metrics["initial-loss"] = mean_loss(edge, llm, data, order, batch_size=config.batch_size)

    guard = guard_of(edge, llm, forgotten, config.guard_forgotten * config.participants(config.clients))

    def train(drift: Mapping[str, Tensor] | None = None) -> TrainOutcome:
        if config.dp == "sample":
            rate, steps = sampling_of(data, settings)
            metrics["epsilon"] = charge(config, state, rate, steps)
            private = Private(config.dp_clip, config.dp_noise)
            return train_private(
                edge, llm, data, settings, private, client=client, round_number=number, frozen=frozen
            )
        return train_local(
            *(edge, llm, data, settings),
            seed=config.seed,
            client=client,
            round_number=number,
            frozen=frozen,
            drift=drift,
            guard=guard,
        )

    control = _Control(instruction, memory, started) if advice.get("control_variates") else None
    outcome = train(control.drift if control else None)
    metrics |= {"guarded": len(guard), "guard-loss": outcome.guard_loss or 0.0} if guard else {}
    trained = edge.travelling()
    fisher = _fisher(edge, llm, data, config, client, number) if advice.get("fisher") else None
    going = {name: leaf for name, leaf in trained.items() if name not in frozen | personal}
    for fault in parse_faults(str(advice.get("fault", ""))):
        noise = torch.Generator().manual_seed(stream_seed(config.seed, "fault", number, client))
        going = distort(fault, going, started, noise)
    seen, carry = going, _taken(memory, _CARRY)
    # What was lost at another rank belongs nowhere.
    carry = {k: v for k, v in carry.items() if k in trained and v.shape == trained[k].shape}
    if fisher is not None:
        fisher = {name: fisher[name] for name in going}
    if codec is not None:
        going, seen, carry = pack_update(codec, going, started, carry)
        fisher = None if fisher is None else pack_fisher(fisher)
    keep = {f"{_PERSONAL}{name}": trained[name] for name in personal}
    keep |= {f"{_CARRY}{name}": lost for name, lost in carry.items()}
    if control is not None:
        keep |= {f"{_CONTROL}{k}": c for k, c in control.after(seen, outcome, settings).items()}
    if advice.get("personal_adapter"):
        edge.load_travelling({**begin, **_taken(memory, _OWN)})
        train()
        keep |= {f"{_OWN}{name}": leaf for name, leaf in edge.travelling().items()}
    if keeps:
        state.save(number, keep, instruction.accepted)
    return Contribution(outcome, going, fisher, metrics)


def _fisher(
    edge: NanoEdge, llm: LanguageModel, data: ClientData, config: RunConfig, client: str, number: int
) -> dict[str, Tensor]:
    """Of the trained adapters, over samples drawn for it."""
    chosen = draw(
        len(data),
        min(config.fisher_samples, len(data)),
        seed=stream_seed(config.seed, "fisher", number),
        client=client,
        start=0,
    )
    return empirical_fisher(edge, llm, data, chosen, batch_size=config.batch_size)


class _Control:
    """SCAFFOLD's control variates on the client (arXiv:1910.06378, option II)."""

    def __init__(
        self, instruction: Instruction, memory: Mapping[str, Tensor], started: dict[str, Tensor]
    ) -> None:
        server, own = _taken(instruction.extra, _CONTROL), _taken(memory, _CONTROL)
        self._started = started
        zero = {name: torch.zeros(leaf.shape, dtype=torch.float64) for name, leaf in started.items()}
        self._server = {name: server[name].double() if name in server else zero[name] for name in started}
        self._own = {name: own.get(name, zero[name]) for name in started}
        self.drift = {name: (self._server[name] - self._own[name]).float() for name in started}

    def after(
        self, seen: Mapping[str, Tensor], outcome: TrainOutcome, settings: TrainSettings
    ) -> dict[str, Tensor]:
        """``c_k - c + (theta - theta_k) / (K eta)``, from the leaves that the server sees."""
        walked = outcome.steps * settings.learning_rate
        return {
            name: self._own[name]
            - self._server[name]
            + (self._started[name].double() - leaf.double()) / walked
            for name, leaf in seen.items()
        }


def _names(advice: Mapping[str, Scalar], key: str) -> frozenset[str]:
    return frozenset(name for name in str(advice.get(key, "")).split(",") if name)


def _taken(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
