"""Differential privacy in rounds: what is refused, what bounds an update, what a round costs.

*Client level*: each client's change is clipped to norm C, all count the same, and noise of standard deviation ``z C``
is added to the sum of the changes: by the server, or under secure aggregation by the clients, each with its part. Which
clients a round takes is no secret, so no amplification by sampling is counted; a client costs what the rounds that
asked it cost.

*Sample level*: clients train with `fednano.training.private` and keep their own ledgers. What a client was asked to
release counts, whether or not the server got it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace

import torch

from fednano.aggregation import Leaves, Rule, Spec, State, Update, layout_of
from fednano.aggregation.server_opt import ServerOptimiser
from fednano.errors import ConfigError, RunError
from fednano.federation.asking import sample_clients
from fednano.federation.client_state import ClientState
from fednano.federation.config import RunConfig
from fednano.federation.phase import MAIN_PHASE, Federation
from fednano.privacy.dp import BudgetSpent, Ledger, Noise, clip_factor, norm
from fednano.runs.atomic import write_bytes

__all__ = [
    "add_noise",
    "bounded",
    "cannot_afford",
    "charge",
    "check_private",
    "epsilon_so_far",
    "privacy_of",
    "round_costs",
]

_FILE = "privacy.json"


def check_private(rule: Rule, spec: Spec, config: RunConfig, gathers: bool) -> None:
    """Refuse, before anything is trained, what the noise would not cover.

    Raises:
        ConfigError: with the reason.
    """
    if config.dp == "off":
        return
    asked = rule.client_config(1)
    for applies, reason in (
        (config.baselines, "baselines train on the same data again, without noise; leave them out"),
        (
            gathers,
            f"adapter {config.adapter!r} takes its basis from clients' gradients, without noise; choose another",
        ),
        (config.late != "drop", "a late update counts less than the noise assumes; set late to 'drop'"),
        (
            config.dp == "client" and not _plain_mean(rule, spec),
            f"noise is calibrated for means of clipped changes, and rule {rule.name!r} merges something else; use "
            "fedavg, fedprox, ffa, rolora, fedsa, feddpa, or a server optimiser over one of them",
        ),
        (
            config.dp == "sample" and bool({"fisher", "initial_loss", "personal_adapter"} & set(asked)),
            f"rule {rule.name!r} asks clients for more than noised gradients; use fedavg, ffa or rolora, for example",
        ),
    ):
        if applies:
            raise ConfigError(f"dp {config.dp!r}: {reason}.")


def _plain_mean(rule: Rule, spec: Spec) -> bool:
    inner = rule._inner() if isinstance(rule, ServerOptimiser) else rule
    if not (inner.capability.differential_privacy and inner.capability.secure_aggregation):
        return False
    layout = layout_of(inner, spec, _zeros(spec), round=1)
    return layout.numbers == ("weight",) and {purpose for purpose, _, _ in layout.leaves} == {"mean"}


def _zeros(spec: Spec) -> Leaves:
    return {name: torch.zeros(leaf.shape) for name, leaf in spec.leaves.items()}


def bounded(update: Update, current: Leaves, config: RunConfig, share: float = 0.0) -> Update:
    """An update with its change clipped to ``dp-clip`` and weight 1.

    Args:
        update: from a client.
        current: the leaves that it started from.
        config: the run's settings.
        share: part of the noise's variance that is added here.
    """
    change = {name: leaf.double() - current[name].double() for name, leaf in update.leaves.items()}
    factor = clip_factor(norm(change.values()), config.dp_clip)
    source, deviation = Noise(), config.dp_noise * config.dp_clip * share**0.5
    leaves = {}
    for name, moved in change.items():
        leaves[name] = current[name].double() + moved * factor
        if share:
            leaves[name] += deviation * source.normal(tuple(moved.shape))
    return replace(update, leaves=leaves, weight=1.0)


def add_noise(state: State, config: RunConfig, noise: Noise | None = None) -> None:
    """Add the round's noise to the sum of the clipped updates."""
    source, deviation, mean = noise or Noise(), config.dp_noise * config.dp_clip, state.sums["mean"]
    mean.add({name: deviation * source.normal(shape) for name, shape in mean.shapes.items()}, 1.0)


def round_costs(config: RunConfig, names: Collection[str], rounds: int) -> Ledger:
    """What the client that was asked most often has spent after so many rounds, at client level."""
    asked = dict.fromkeys(names, 0)
    for number in range(1, rounds + 1):
        for name in sample_clients(config, list(names), number, config.over_select):
            asked[name] += 1
    return Ledger().after(config.dp_noise, 1.0, max(asked.values(), default=0))


def cannot_afford(config: RunConfig, names: Collection[str], rounds: int) -> str:
    """Why a run at client level must not do so many rounds; empty where it may, or where clients watch themselves."""
    if config.dp != "client" or not config.dp_epsilon:
        return ""
    try:
        round_costs(config, names, rounds).require(config.dp_epsilon, config.dp_delta)
    except BudgetSpent as error:
        return str(error)
    return ""


def epsilon_so_far(fed: Federation, phase: str, rounds: int) -> dict[str, float]:
    """Epsilon and delta after so many rounds: at sample level of the client that has spent most."""
    config = fed.config
    if config.dp == "client":
        epsilon = round_costs(config, fed.nodes, rounds).epsilon(config.dp_delta)
    else:
        rows = [row for row in fed.folder.metrics() if row.get("phase") == phase]
        epsilon = max((float(row["epsilon"]) for row in rows if "epsilon" in row), default=0.0)
    return {"epsilon": epsilon, "delta": config.dp_delta}


def privacy_of(fed: Federation, rounds: int) -> dict[str, float | str]:
    """What the summary says of a run's privacy."""
    config = fed.config
    return {
        **epsilon_so_far(fed, MAIN_PHASE, rounds),
        "unit": config.dp,
        "clip": config.dp_clip,
        "noise": config.dp_noise,
        "budget": config.dp_epsilon,
        "noise_added_by": "clients" if config.dp == "sample" or config.secure_aggregation else "server",
    }


def charge(config: RunConfig, memory: ClientState, rate: float, steps: int) -> float:
    """Write a round of sample-level training into the client's ledger, before it begins. Returns epsilon.

    Args:
        config: the run's settings.
        memory: of the client.
        rate: at which a step draws each sample.
        steps: of the round.

    Raises:
        BudgetSpent: the round would cost more than is left; nothing is written.
        RunError: the ledger is damaged, or the disk is full.
    """
    path = memory.folder / _FILE
    try:
        before = Ledger.from_json(json.loads(path.read_bytes())) if path.exists() else Ledger()
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"this client's privacy ledger cannot be read ({path}: {error}); without it, nobody knows what it has "
            "spent. Restore it from a backup, or leave the client out."
        ) from error
    after = before.after(config.dp_noise, rate, steps)
    after.require(config.dp_epsilon, config.dp_delta)
    memory.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_bytes(path, json.dumps(after.to_json()).encode())
    return after.epsilon(config.dp_delta)
