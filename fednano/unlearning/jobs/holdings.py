"""What each site of a run holds and what was trained on: the ground on which a request's scope is judged.

A simulated site's samples follow from the run's settings. A real site's lie at the site: there, or on a machine that
may read its folder, give the folder's path; elsewhere the server knows numbers only and takes the owner's signed word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fednano.errors import ConfigError, DataError, RunError
from fednano.runs import RunFolder
from fednano.runs.tombstones import read_tombstones

if TYPE_CHECKING:
    from fednano.data import Sample
    from fednano.federation.config import RunConfig

__all__ = ["Holding", "Holdings", "RunHoldings", "choose", "subject_of"]


@dataclass(frozen=True)
class Holding:
    """What one site holds.

    Attributes:
        train: its training samples, in order; forgotten ones are left out.
        held_out: the samples that it judges by.
        first_round: sample id -> the first round that trained on it; ids that no round drew are absent.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample] = ()
    first_round: Mapping[str, int] = field(default_factory=dict)

    @property
    def samples(self) -> list[Sample]:
        """All of them."""
        return [*self.train, *self.held_out]


class Holdings(Protocol):
    """What the desk asks about a run."""

    def sites(self) -> dict[str, int]:
        """The sites that took part, with the number of their training samples."""
        ...

    def holding(self, site: str) -> Holding | None:
        """What a site holds; ``None`` where only the site knows."""
        ...

    def base_model(self) -> str:
        """What is wrong with the base model the run was made on, as far as this machine can see; empty = nothing."""
        ...


def subject_of(sample: Sample, name: str) -> bool:
    """Whether a sample is about a subject: ``name`` is a part of its id between slashes, or names its image file."""
    return name in sample.id.split("/") or (
        sample.image is not None and name in (sample.image.name, sample.image.stem)
    )


def choose(holding: Holding, kind: str, name: str, ids: Sequence[str] = ()) -> list[str]:
    """The sample ids of a scope.

    Args:
        holding: what the site holds.
        kind: ``"samples"``, ``"subject"``, ``"class"`` or ``"client"``.
        name: the subject, or the class (the answer to learn).
        ids: the ids, for kind ``"samples"``.

    Raises:
        ConfigError: nothing is named, an id is not this site's, or nothing fits the name.
    """
    samples = holding.samples
    if kind == "samples":
        wanted = list(dict.fromkeys(ids))
        own = {sample.id for sample in samples}
        foreign = [each for each in wanted if each not in own]
        if not wanted:
            raise ConfigError("no sample ids were given; expected one a line.")
        if foreign:
            raise ConfigError(
                f"{len(foreign)} of {len(wanted)} ids are not this site's, the first is {foreign[0]!r}; an id looks "
                f"like {samples[0].id!r}. Check the ids, or ask the site that holds them."
                if samples
                else f"this site holds no samples any more; {foreign[0]!r} is not its own."
            )
        return wanted
    if kind == "subject":
        found = [sample.id for sample in samples if subject_of(sample, name)]
    elif kind == "class":
        found = [sample.id for sample in samples if sample.answer == name]
    else:
        found = [sample.id for sample in samples]
    if not found:
        answers = sorted({sample.answer for sample in samples})
        known = f" Its classes: {', '.join(answers[:20])}." if kind == "class" else ""
        raise ConfigError(f"no sample of this site belongs to {kind} {name!r}.{known}")
    return found


class RunHoldings:
    """Holdings of a finished run.

    Args:
        run: the run folder.
        data: site -> its own data folder, for real sites whose data this machine may read.

    Raises:
        RunError: the run has not got far enough to have clients.
    """

    def __init__(self, run: Path, data: Mapping[str, Path] | None = None) -> None:
        self._folder = RunFolder(run)
        self._data = dict(data or {})
        partition = self._folder.read_json("partition.json")
        self._simulated = partition.get("kind") != "sites"
        self._counts = {str(name): int(count) for name, count in partition["samples"].items()}
        unknown = sorted(set(self._data) - set(self._counts))
        if unknown:
            raise ConfigError(
                f"data was given for site {unknown[0]!r}, which took no part. Sites: {', '.join(self._counts)}."
            )
        self._held: dict[str, Holding] = {}

    def sites(self) -> dict[str, int]:
        """The sites that took part, with the number of their training samples."""
        return dict(self._counts)

    def holding(self, site: str) -> Holding | None:
        """What a site holds; ``None`` where only the site knows."""
        if not self._simulated and site not in self._data:
            return None
        if site not in self._held:
            from fednano.unlearning.sites import first_rounds

            train, held = self._samples(site)
            rounds = self._rounds(site)
            forgotten = read_tombstones(self._folder.path)
            self._held[site] = Holding(
                forgotten.keep(train),
                forgotten.keep(held),
                first_rounds(self._config(), train, site, rounds, forgotten.epoch),
            )
        return self._held[site]

    def base_model(self) -> str:
        """What is wrong with the base model; empty = nothing. Loads the edge part of the model."""
        from fednano.errors import ModelError
        from fednano.federation.model import build_edge

        try:
            expected = self._folder.read_json("adapter.json").get("edge")
        except RunError:
            return "the run has no final adapter yet. Let it finish first"
        try:
            found = build_edge(self._config()).edge.fingerprint
        except ModelError as error:
            return f"the base model of the run cannot be loaded: {error}"
        if expected == found:
            return ""
        return (
            f"the run was made on another base model (edge weights {str(expected)[:16]}, here {found[:16]}). Restore "
            "that model"
        )

    def _config(self) -> RunConfig:
        from fednano.federation.server import config_of

        return config_of(self._folder)

    def _samples(self, site: str) -> tuple[Sequence[Sample], Sequence[Sample]]:
        from fednano.federation.model import (
            client_name,
            hold_out,
            load_data,
            load_site_data,
            partition_samples,
        )

        config = self._config()
        if site in self._data:
            dataset = load_site_data(config, str(self._data[site]))
            return hold_out(config, dataset, range(len(dataset)))
        names = {client_name(number): number for number in range(config.clients)}
        if site not in names:
            raise DataError(
                f"{site!r} is no simulated client of this run; it has {', '.join(sorted(names))}."
            )
        return partition_samples(config, load_data(config), names[site], config.clients)

    def _rounds(self, site: str) -> list[int]:
        """The rounds whose merged adapter holds an update of this site."""
        rows = self._folder.metrics()
        return sorted(
            {
                int(row["round"])
                for row in rows
                if row.get("phase") == "federated"
                and row.get("scope") == "client"
                and row.get("client") == site
                and row["round"] > 0
                and row.get("loss") is not None
                and "refused" not in row
            }
        )
