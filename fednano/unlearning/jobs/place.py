"""Where the jobs of a run keep their files: ``unlearning/`` in the run folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednano.errors import RunError
from fednano.runs import RunFolder
from fednano.runs.tombstones import FOLDER
from fednano.security.keys import Signer, create_key, load_signer
from fednano.unlearning.jobs.ledger import Ledger
from fednano.unlearning.jobs.registry import Registry
from fednano.unlearning.jobs.store import Store

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """The job files of one run.

    Attributes:
        folder: the run's folder.
    """

    folder: RunFolder

    @classmethod
    def of(cls, run: Path) -> Place:
        """The place in a run folder given by its path."""
        return cls(RunFolder(run))

    @property
    def root(self) -> Path:
        """The folder of all of them."""
        return self.folder.path / FOLDER

    @property
    def store(self) -> Store:
        """The jobs."""
        return Store(self.root / "jobs.sqlite")

    @property
    def registry(self) -> Registry:
        """Keys and policy."""
        return Registry.load(self.root / "registry.json")

    @property
    def ledger(self) -> Ledger:
        """The log of receipts."""
        return Ledger(self.root / "log.jsonl", self.folder.id)

    @property
    def lock(self) -> Path:
        """What the one worker holds."""
        return self.root / "worker.sqlite"

    def exists(self) -> bool:
        """Whether this run has, or had, any job."""
        return (self.root / "jobs.sqlite").exists()

    def receipt(self, job: str) -> Path:
        """The receipt of a job."""
        return self.root / "receipts" / f"{job}.json"

    def staging(self, batch: str) -> Path:
        """Shadow adapter, outcome and escrow of a batch."""
        return self.root / "jobs" / batch

    def quarantine(self, job: str) -> Path:
        """Where purged files of a job wait."""
        return self.root / "quarantine" / job

    def server_key(self, path: Path | None = None) -> Signer:
        """The server's key: the one given, or the run's own, made at its first use."""
        if path is not None:
            return load_signer(path)
        own = self.root / "server.key"
        return load_signer(own) if own.exists() else create_key(self.root, "server")

    def adapter(self) -> tuple[str, bytes, dict[str, Any]]:
        """The global adapter: sha256 of its tensors file, that file's content, and its description.

        Raises:
            RunError: the run has none yet, or it is damaged.
        """
        info = self.folder.read_json("adapter.json")
        payload = self.folder.file(str(info.get("file", "adapter.safetensors"))).read_bytes()
        digest = hashlib.sha256(payload).hexdigest()
        if digest != info.get("sha256"):
            raise RunError(
                f"the adapter of run {self.folder.id} is damaged: its sha256 is not the one in adapter.json. Restore "
                "both files from a backup."
            )
        return digest, payload, {key: value for key, value in info.items() if key not in ("sha256", "file")}
