"""Audit a finished run: its model, its adapters, its data, its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fednano.data import Sample
from fednano.errors import ConfigError, RunError
from fednano.federation.answer import tuned_edge
from fednano.federation.messages import HostTicket
from fednano.federation.model import client_name, connect, load_data, partition_samples, use_threads
from fednano.federation.phase import PhaseResult
from fednano.federation.schedules import fit_rank
from fednano.privacy.audit.finding import Finding
from fednano.privacy.audit.updates import labels_from_updates, members_from_updates, replay
from fednano.privacy.audit.wire import (
    Protection,
    answers_from_labels,
    images_from_features,
    words_from_embeddings,
)
from fednano.runs import RunFolder
from fednano.training.features import FeatureCache
from fednano.training.seeds import generator

__all__ = ["RESULT", "Finding", "audit_run"]

RESULT = "privacy-audit.json"
_DTYPES = ("float32", "bfloat16", "int8")


def audit_run(
    run: str,
    *,
    runs_dir: Path = Path("runs"),
    samples: int = 64,
    clients: int = 5,
    noise: Sequence[float] = (0.3, 1.0, 3.0),
) -> list[Finding]:
    """Attack what a run of simulated clients puts on the wire, and write ``privacy-audit.json`` into its folder.

    Args:
        run: a run's id or folder, or ``"latest"``.
        runs_dir: folder of the run folders.
        samples: to attack, and to arm the attacker with; of each client, for membership.
        clients: whose updates are attacked, at most.
        noise: strengths of noise on embeddings to try, over their root mean square. Runs have no such noise; this says
            what it would take.

    Raises:
        RunError: there is no such run, it has no checkpoints, or its clients had data of their own.
        ConfigError: a number is out of its range.
    """
    if samples < 2 or clients < 1 or any(level <= 0 for level in noise):
        raise ConfigError(
            f"got samples {samples}, clients {clients}, noise {list(noise)}; expected at least 2, at least 1, and "
            "positive numbers."
        )
    folder = RunFolder.open(run, root=runs_dir)
    config, edge = tuned_edge(folder)
    original = RunFolder.open(run, root=runs_dir).config()
    use_threads(config)
    cache = FeatureCache(edge.edge, None)
    partition = folder.read_json("partition.json")
    if partition["kind"] == "sites":
        raise RunError(
            f"run {folder.id} trained on data that stayed with its sites; an audit needs samples to attack. Simulate "
            "with data of the same kind."
        )
    training = load_data(config)
    shares = {
        client_name(n): partition_samples(config, training, n, config.clients)
        for n in range(min(clients, config.clients))
    }
    public = _some(list(load_data(config, "test")), 2 * samples, config.seed, "public")
    victims = _some(
        [sample for share, _ in shares.values() for sample in share], samples, config.seed, "victims"
    )
    found: list[Finding] = []
    own = str(original.get("wire-dtype", "float32"))
    names = dict.fromkeys((own, *_DTYPES))
    protections = [*(Protection(name) for name in names), *(Protection(own, level) for level in noise)]
    if str(original.get("placement")) == "split":
        found += words_from_embeddings(edge, victims, protections, cache, config.seed)
        images, picture = images_from_features(edge, victims, public, protections, cache, config.seed)
        found += images
        if str(original.get("exchange")) != "label-private":
            found.append(answers_from_labels(edge, victims, cache))
        if picture is not None:
            folder.save_image("privacy-audit", picture)
    rounds = folder.checkpoints()
    if not rounds:
        raise RunError(f"run {folder.id} has no checkpoints left, so its updates cannot be made again.")
    number = rounds[-1]
    if number - 1 in rounds:
        saved = folder.load_checkpoint(number - 1)
        start = PhaseResult.of_checkpoint(saved.tensors, saved.state).leaves
    else:
        start = tuned_edge(folder, untuned=True)[1].travelling()
    fit_rank(edge, start)
    with connect(config, HostTicket()) as llm:
        replayed = replay(config, edge, llm, cache, shares, start, number)
        found += labels_from_updates(replayed, config, edge, llm, cache, public)
        found += members_from_updates(replayed, config, edge, llm, cache, samples)
    folder.write_json(RESULT, {"run": folder.id, "round": number, "findings": [asdict(f) for f in found]})
    return found


def _some(samples: list[Sample], count: int, seed: int, purpose: str) -> list[Sample]:
    chosen = generator(seed, "audit", purpose).permutation(len(samples))[:count]
    return [samples[int(index)] for index in sorted(chosen)]
