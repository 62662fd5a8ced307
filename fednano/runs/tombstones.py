"""Tombstones: what a run must never train on again, kept in the run folder as salted hashes of sample ids.

``unlearning/tombstones.json`` grows by one set for each committed unlearning job. Its ``epoch`` counts the changes: an
adapter, a checkpoint or an update that carries an older epoch was made while the forgotten samples were still in use.
``unlearning/commit.json`` exists while adapter and tombstones are being exchanged.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fednano.errors import RunError
from fednano.runs.atomic import read_json, write_json
from fednano.runs.metrics import JsonLines, read_json_lines

__all__ = [
    "Tombstone",
    "Tombstones",
    "append_alarm",
    "commit_pending",
    "read_alarms",
    "read_tombstones",
    "sample_hash",
    "write_tombstones",
]

FOLDER = "unlearning"
FILE = f"{FOLDER}/tombstones.json"
PENDING = f"{FOLDER}/commit.json"
ALARMS = f"{FOLDER}/alarms.jsonl"


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


_Item = TypeVar("_Item", bound=_HasId)


def sample_hash(salt: str, sample_id: str) -> str:
    """HMAC-SHA-256 (RFC 2104) of a sample id under a site's salt (hexadecimal), 64 hexadecimal characters."""
    return hmac.new(bytes.fromhex(salt), f"sample\0{sample_id}".encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Tombstone:
    """The forgotten samples of one job.

    Attributes:
        job: the job's id.
        site: the owner.
        salt: the owner's salt, hexadecimal.
        hashes: :func:`sample_hash` of each sample.
        level: exact memorisation that samples never trained on show, or these after the commit, if that is more;
            what lies well above it has come back. ``None``: not known.
    """

    job: str
    site: str
    salt: str
    hashes: frozenset[str]
    level: float | None = None


@dataclass(frozen=True)
class Tombstones:
    """All tombstones of a run, or those that one client is told of.

    Attributes:
        epoch: number of changes so far; 0 where nothing was ever forgotten.
        sets: one for each job.
    """

    epoch: int = 0
    sets: tuple[Tombstone, ...] = ()

    def for_site(self, site: str) -> Tombstones:
        """Those of one owner, at the same epoch: other clients are not told what it forgets."""
        return Tombstones(self.epoch, tuple(each for each in self.sets if each.site == site))

    def keep(self, samples: Sequence[_Item]) -> Sequence[_Item]:
        """The samples that are not forgotten, in their order."""
        if not self.sets:
            return samples
        by_salt: dict[str, set[str]] = {}
        for each in self.sets:
            by_salt.setdefault(each.salt, set()).update(each.hashes)
        return [
            sample
            for sample in samples
            if not any(sample_hash(salt, sample.id) in hashes for salt, hashes in by_salt.items())
        ]

    @property
    def digest(self) -> str:
        """Name of the content: what a client answers to show that it uses these tombstones."""
        return (
            f"{self.epoch}:{hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()}"
        )

    def to_json(self) -> dict[str, Any]:
        """As the file and messages hold it."""
        sets = [
            {"job": s.job, "site": s.site, "salt": s.salt, "hashes": sorted(s.hashes)}
            | ({} if s.level is None else {"level": s.level})
            for s in sorted(self.sets, key=lambda s: s.job)
        ]
        return {"epoch": self.epoch, "sets": sets}

    @classmethod
    def from_json(cls, body: Any) -> Tombstones:
        """Inverse of :meth:`to_json`.

        Raises:
            RunError: the content is something else.
        """
        try:
            sets = tuple(
                Tombstone(
                    *(str(s["job"]), str(s["site"]), bytes.fromhex(s["salt"]).hex(), frozenset(s["hashes"])),
                    level=float(s["level"]) if "level" in s else None,
                )
                for s in body["sets"]
            )
            return cls(int(body["epoch"]), sets)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"the tombstones are damaged ({error!r}). Restore {FILE} from a backup, or run: fednano unlearn verify"
            ) from error


def read_tombstones(run: Path) -> Tombstones:
    """The tombstones of a run folder; none where nothing was forgotten.

    Raises:
        RunError: the file is damaged. Training must not go on then.
    """
    path = run / FILE
    return Tombstones.from_json(read_json(path)) if path.exists() else Tombstones()


def write_tombstones(run: Path, tombstones: Tombstones) -> None:
    """Replace the file in one step, readable by its owner only: it holds salts. Raises RunError."""
    write_json(run / FILE, tombstones.to_json())
    (run / FILE).chmod(0o600)


def commit_pending(run: Path) -> bool:
    """Whether an unlearning commit or rollback is under way, or was cut off and waits to be finished."""
    return (run / PENDING).exists()


def append_alarm(run: Path, line: Mapping[str, Any]) -> None:
    """Add to the run's audit that a forgotten set is known again. Raises RunError."""
    (run / FOLDER).mkdir(exist_ok=True)
    log = JsonLines(run / ALARMS)
    try:
        log.append(line)
    finally:
        log.close()


def read_alarms(run: Path, job: str) -> list[dict[str, Any]]:
    """The alarms about one job, oldest first."""
    return [row for row in read_json_lines(run / ALARMS) if row.get("job") == job]
