"""Purge: find what descends from adapters that knew the forgotten samples, and quarantine or delete it.

Listed are checkpoints from the round of first exposure on, earlier adapters in escrow, tensors that were exported into
the run folder, and encoder features. What lies elsewhere (other runs, clients, shared caches) is named as not reached.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError, JobStateError, RunError
from fednano.runs.atomic import read_json, write_json
from fednano.security.canonical import canonical, sha256_hex
from fednano.security.keys import Signer
from fednano.unlearning.jobs.job import Job, timestamp
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.store import only_worker

__all__ = ["Item", "inventory", "purge", "restore"]

_WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".gguf", ".npz", ".ckpt", ".onnx"}


@dataclass(frozen=True)
class Item:
    """Something that descends from a tainted adapter.

    Attributes:
        what: its path in the run folder, or what it is.
        kind: ``checkpoint``, ``escrow``, ``export``, ``cache``, ``run``, ``client`` or ``output``.
        status: ``present``, ``quarantined``, ``deleted``, ``not reached`` or ``kept``.
        bytes: its size; 0 where it is not known.
        why: why it is listed, or why it was not reached.
    """

    what: str
    kind: str
    status: str
    bytes: int
    why: str


def inventory(place: Place, identity: str) -> list[Item]:
    """All that descends from the adapters that knew a job's samples, as it stands now.

    Raises:
        JobStateError: the job is not committed.
    """
    job = _committed(place, identity)
    first, epoch = int(job.facts.get("first_exposure", 1)), int(job.facts["epoch"])
    root = place.folder.path
    items = []
    for path, kind, why in _reachable(place, first, epoch):
        items.append(Item(str(path.relative_to(root)), kind, "present", _size(path), why))
    aside = place.quarantine(identity)
    if aside.is_dir():
        moved = read_json(aside / "moved.json") if (aside / "moved.json").exists() else {}
        for name, kind in moved.items():
            if (aside / "files" / name).exists():
                items.append(Item(name, kind, "quarantined", _size(aside / "files" / name), "moved by purge"))
    for entry in job.facts.get("purge", {}).get("items", []):
        if entry["status"] == "deleted":
            items.append(Item(**entry))
    return items + list(_unreachable(place, job))


def purge(place: Place, identity: str, mode: str, signer: Signer, *, actor: str) -> list[Item]:
    """Quarantine or delete what :func:`inventory` lists as reachable; can be repeated.

    Args:
        place: the run's job files.
        identity: the job.
        mode: ``"quarantine"`` (a rollback brings it back) or ``"delete"`` (nothing does).
        signer: the server's key, which signs the log.
        actor: who does it.

    Returns:
        The items as they stand afterwards.

    Raises:
        JobStateError: the job is not committed.
        ConfigError: unknown mode.
    """
    if mode not in ("quarantine", "delete"):
        raise ConfigError(f"mode is {mode!r}; expected 'quarantine' or 'delete'.")
    with only_worker(place.lock):
        job = _committed(place, identity)
        items = inventory(place, identity)
        if mode == "delete":
            # Said before it is done: from here on nobody may count on a rollback.
            earlier = job.facts.get("purge", {}).get("items", [])
            place.store.add_facts(identity, {"purge": {"mode": mode, "time": timestamp(), "items": earlier}})
        root, aside = place.folder.path, place.quarantine(identity)
        moved = read_json(aside / "moved.json") if (aside / "moved.json").exists() else {}
        done: list[Item] = []
        for item in items:
            if item.status == "present" and mode == "quarantine" and item.kind != "escrow":
                moved[item.what] = item.kind
                write_json(aside / "moved.json", moved)
                done.append(_attempt(item, "quarantined", root / item.what, aside / "files" / item.what))
            elif item.status in ("present", "quarantined") and mode == "delete":
                here = root / item.what if item.status == "present" else aside / "files" / item.what
                done.append(_attempt(item, "deleted", here, None))
            else:
                done.append(item)
        if mode == "delete":
            shutil.rmtree(aside, ignore_errors=True)
        report = {
            "actor": actor,
            "items": [asdict(i) for i in done],
            "job": identity,
            "mode": mode,
            "time": timestamp(),
        }
        content = canonical(report)
        index, previous = place.ledger.head()
        name = f"purge-{identity}-{index}.json"
        write_json(place.root / "receipts" / name, {**report, "sha256": sha256_hex(content)})
        place.ledger.append(
            place.ledger.about(signer, "purge", identity, content, index=index, previous=previous)
        )
        place.store.add_facts(
            identity,
            {"purge": {"mode": mode, "time": report["time"], "items": report["items"], "file": name}},
        )
    return done


def restore(place: Place, identity: str) -> None:
    """Bring back what was quarantined for a job; what stands in its place is left alone."""
    aside = place.quarantine(identity)
    if not (aside / "moved.json").exists():
        return
    for name in read_json(aside / "moved.json"):
        here, there = aside / "files" / name, place.folder.path / name
        if here.exists() and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            here.rename(there)
    shutil.rmtree(aside, ignore_errors=True)


def _attempt(item: Item, status: str, here: Path, there: Path | None) -> Item:
    try:
        if there is not None:
            there.parent.mkdir(parents=True, exist_ok=True)
            here.rename(there)
        elif here.is_dir():
            shutil.rmtree(here)
        else:
            here.unlink()
    except OSError as error:
        return Item(item.what, item.kind, "not reached", item.bytes, f"{error.strerror or error}")
    return Item(item.what, item.kind, status, item.bytes, item.why)


def _committed(place: Place, identity: str) -> Job:
    job = place.store.job(identity)
    if job.state is not State.COMMITTED:
        raise JobStateError(
            f"job {identity} is {job.state.value}; there is something to purge once it is committed."
        )
    return job


def _reachable(place: Place, first: int, epoch: int) -> Iterator[tuple[Path, str, str]]:
    root = place.folder.path
    for state in sorted((root / "checkpoints").glob("**/state.json")):
        number, made = _checkpoint_facts(state)
        if made >= epoch:
            continue
        if number >= first:
            yield state.parent, "checkpoint", f"round {number}, first exposure in round {first}"
    current = place.adapter()[0]
    epochs = {job.batch: int(job.facts["epoch"]) for job in place.store.jobs() if "epoch" in job.facts}
    at_work = {job.batch for job in place.store.jobs(State.RUNNING, State.VERIFYING)}
    for path in sorted((place.root / "jobs").glob("*/*.safetensors")):
        made = epochs.get(path.parent.name, 0)
        # What a later job kept, and this one's own outcome, were made without the samples.
        clean = made > epoch or (made == epoch and path.stem == "after") or path.parent.name in at_work
        if not clean and sha256_hex(path.read_bytes()) != current:
            yield path, "escrow", "an adapter of before the commit, kept for rollback"
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if (
            parts[0] in ("checkpoints", "unlearning", "cache")
            or path.suffix not in _WEIGHTS
            or not path.is_file()
        ):
            continue
        if sha256_hex(path.read_bytes()) != current:
            yield path, "export", "weights in the run folder that are not the committed adapter"
    if (root / "cache").is_dir():
        yield root / "cache", "cache", "encoder features of the run's images, the forgotten ones among them"


def _checkpoint_facts(state: Path) -> tuple[int, int]:
    """Round and epoch of a checkpoint; one that cannot be read counts as tainted."""
    try:
        body: dict[str, Any] = read_json(state)
        return int(body["round"]), int(body["state"].get("tombstones", 0))
    except (RunError, KeyError, TypeError, ValueError, AttributeError):
        return 2**31, 0


def _unreachable(place: Place, job: Job) -> Iterator[Item]:
    root = place.folder.path
    if (root / "predictions.json").exists():
        why = "answers to test questions, no weights; written again by the next report"
        yield Item("predictions.json", "output", "kept", _size(root / "predictions.json"), why)
    config = place.folder.config()
    outside = str(config.get("cache-dir") or "")
    if outside and not Path(outside).absolute().is_relative_to(root):
        yield Item(
            "cache-dir",
            "cache",
            "not reached",
            0,
            "a feature cache outside of the run folder; empty it by hand",
        )
    for other in sorted(root.parent.glob("*/config.json")):
        if other.parent.is_symlink() or other.parent == root:
            continue
        try:
            parent = str(read_json(other).get("start-from") or "")
        except (RunError, AttributeError):
            continue
        if parent and Path(parent).name == place.folder.id:
            why = "a run that was started from this one; unlearn or delete it too"
            yield Item(other.parent.name, "run", "not reached", 0, why)
    try:
        sites = place.folder.read_json("partition.json")["samples"]
    except (RunError, KeyError, TypeError):
        sites = {}
    for site in sorted(sites):
        if site != job.site:
            why = "received adapters of tainted rounds; nothing is kept on disk by fednano, tell it (GDPR Art. 19)"
            yield Item(site, "client", "not reached", 0, why)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
