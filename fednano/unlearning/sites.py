"""Who holds which samples, what is forgotten of them, and when a run first trained on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from fednano.data import Sample
from fednano.errors import DataError, RunError
from fednano.federation.config import RunConfig
from fednano.federation.model import client_name, hold_out, load_data, load_site_data, partition_samples
from fednano.runs import RunFolder
from fednano.runs.tombstones import Tombstones, read_tombstones
from fednano.training.data import draw
from fednano.training.seeds import generator

__all__ = [
    "Scope",
    "Site",
    "SiteData",
    "all_sites",
    "first_exposure",
    "first_rounds",
    "own_site",
    "participants",
    "simulated_sites",
    "some",
    "split_scope",
    "withhold",
]

PROBE_SAMPLES = 128
"""Most samples of each kind in a measurement, except for the forget set, which is measured whole."""


class SiteData(Protocol):
    """What the runner needs of a site."""

    @property
    def train(self) -> Sequence[Sample]:
        """Samples that it trains on."""
        ...

    @property
    def held_out(self) -> Sequence[Sample]:
        """Samples that it judges by."""
        ...


@dataclass(frozen=True)
class Site:
    """A site's samples.

    Attributes:
        train: samples that it trains on.
        held_out: samples that it judges by.
    """

    train: Sequence[Sample]
    held_out: Sequence[Sample] = field(default=())


def simulated_sites(
    folder: RunFolder, config: RunConfig, forgotten: Tombstones | None = None
) -> dict[str, SiteData]:
    """The sites of a simulated run; samples that the run has forgotten already are gone.

    Args:
        folder: the run.
        config: its settings.
        forgotten: what is left out instead of all that the run has forgotten.

    Raises:
        RunError: the run was made by real sites, whose data is not here.
        DataError: the data cannot be read or divided.
    """
    if folder.read_json("partition.json").get("kind") == "sites":
        raise RunError(
            f"run {folder.id} was made by real sites, whose data is not on this machine. Give their data as sites, "
            "or run the job at a deployment."
        )
    dataset = load_data(config)
    forgotten = read_tombstones(folder.path) if forgotten is None else forgotten
    sites: dict[str, SiteData] = {}
    for number in range(config.clients):
        train, held = partition_samples(config, dataset, number, config.clients)
        sites[client_name(number)] = Site(forgotten.keep(train), forgotten.keep(held))
    return sites


def all_sites(
    folder: RunFolder, config: RunConfig, data: Mapping[str, Path], forgotten: Tombstones
) -> dict[str, SiteData]:
    """Everybody's samples but the forgotten ones: of the data folders that are given, else of the simulation.

    Args:
        folder: the run.
        config: its settings.
        data: real site to its own data folder.
        forgotten: what is left out.

    Raises:
        RunError: the run was made by real sites, and ``data`` is empty.
        DataError: the data cannot be read or divided.
    """
    if not data:
        return simulated_sites(folder, config, forgotten)
    sites: dict[str, SiteData] = {}
    for name, where in data.items():
        own = own_site(config, str(where))
        sites[name] = Site(forgotten.keep(own.train), forgotten.keep(own.held_out))
    return sites


def own_site(config: RunConfig, data: str) -> SiteData:
    """A real site's samples from its own folder, divided as its training did."""
    dataset = load_site_data(config, data)
    return Site(*hold_out(config, dataset, range(len(dataset))))


@dataclass(frozen=True)
class Scope:
    """What one job forgets.

    Attributes:
        owner: the site that holds it.
        forget: its training samples to forget, in its own order.
        retain: site to the training samples that stay; sites that keep none are left out.
        held_out: site to the samples it judges by, without the forgotten ones.
        ignored: ids that the owner only held out: nothing was learnt from them.
    """

    owner: str
    forget: list[Sample]
    retain: dict[str, list[Sample]]
    held_out: dict[str, list[Sample]]
    ignored: tuple[str, ...]


def split_scope(sites: Mapping[str, SiteData], owner: str, ids: Iterable[str]) -> Scope:
    """Divide everybody's samples into what is forgotten and what stays.

    Raises:
        DataError: the owner is unknown, no id is given, an id is not the owner's, or nothing would be left.
    """
    if owner not in sites:
        raise DataError(f"there is no site {owner!r} in this run; it has {', '.join(sorted(sites))}.")
    wanted = set(ids)
    if not wanted:
        raise DataError("the forget set is empty; name at least one sample id.")
    own = sites[owner]
    known = {sample.id for sample in (*own.train, *own.held_out)}
    if foreign := sorted(wanted - known):
        example = f" An id looks like {own.train[0].id!r}." if own.train else ""
        raise DataError(
            f"{len(foreign)} of {len(wanted)} sample ids are not {owner}'s, the first is {foreign[0]!r}.{example}"
        )
    forget = [sample for sample in own.train if sample.id in wanted]
    retain = {
        name: [s for s in site.train if name != owner or s.id not in wanted] for name, site in sites.items()
    }
    retain = {name: samples for name, samples in sorted(retain.items()) if samples}
    if not retain:
        raise DataError(
            "the forget set is all the training data of this run; nothing would be retained. Delete the run instead."
        )
    held = {
        name: [s for s in site.held_out if name != owner or s.id not in wanted]
        for name, site in sorted(sites.items())
    }
    trained = {sample.id for sample in forget}
    return Scope(owner, forget, retain, held, tuple(sorted(wanted - trained)))


def withhold(scope: Scope, ids: Iterable[str]) -> Scope:
    """A scope whose owner keeps nothing of ``ids``: named by a request, but never trained on, so not to be forgotten.

    Raises:
        DataError: nothing would be left to retain.
    """
    gone, owner = set(ids), scope.owner
    if not gone:
        return scope

    def kept(sets: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        return {n: [s for s in own if n != owner or s.id not in gone] for n, own in sets.items()}

    retain = {name: samples for name, samples in kept(scope.retain).items() if samples}
    if not retain:
        raise DataError("nothing would be retained in this run. Delete the run instead.")
    return replace(scope, retain=retain, held_out=kept(scope.held_out))


def some(
    samples: list[Sample], seed: int, kind: str, *, most: int = PROBE_SAMPLES, shuffle: bool = True
) -> list[Sample]:
    """At most ``most`` samples to measure by, always the same ones for a seed and a kind."""
    if len(samples) <= most:
        return samples
    if not shuffle:
        return samples[:most]
    order = generator(seed, "probe", kind).permutation(len(samples))[:most]
    return [samples[int(index)] for index in sorted(order)]


def first_rounds(
    config: RunConfig, train: Sequence[Sample], site: str, rounds: Sequence[int], epoch: int
) -> dict[str, int]:
    """Sample id to the first round that trained on it; ids that no round drew are absent.

    Args:
        config: the run's settings.
        train: the site's training samples, in order.
        site: its name.
        rounds: those whose merged adapter holds an update of the site.
        epoch: of the run's tombstones. After a commit rounds drew from fewer samples; then every sample counts from the
            first round: rather one too early than one too late.
    """
    if epoch:
        return {sample.id: rounds[0] for sample in train} if rounds else {}
    first: dict[str, int] = {}
    for number in rounds:
        start = (number - 1) * config.samples
        for index in draw(len(train), config.samples, seed=config.seed, client=site, start=start):
            first.setdefault(train[index].id, number)
    return first


def participants(folder: RunFolder) -> dict[int, list[str]]:
    """Round to the clients whose updates were merged in it, sorted, from the run's own record."""
    found: dict[int, set[str]] = {}
    for row in folder.metrics():
        if (
            row.get("phase") == "federated"
            and row.get("scope") == "client"
            and row.get("loss") is not None
            and "refused" not in row
            and not row.get("final")
            and row["round"] > 0
        ):
            found.setdefault(int(row["round"]), set()).add(row["client"])
    return {number: sorted(names) for number, names in sorted(found.items())}


def first_exposure(
    folder: RunFolder, config: RunConfig, site: SiteData, owner: str, forget: Sequence[Sample]
) -> int | None:
    """The first round that trained on one of the samples; ``None`` if none did.

    After an earlier job of the run the answer is the first round: what was drawn is no longer known, and checkpoints
    of later rounds may hold what that job forgot.
    """
    everything = participants(folder)
    rounds = [number for number, names in everything.items() if owner in names]
    if not rounds or not forget:
        return None
    if read_tombstones(folder.path).epoch:
        return min(everything)
    wanted = {sample.id for sample in forget}
    for number in rounds:
        start = (number - 1) * config.samples
        drawn = draw(len(site.train), config.samples, seed=config.seed, client=owner, start=start)
        if any(site.train[index].id in wanted for index in drawn):
            return number
    return None
