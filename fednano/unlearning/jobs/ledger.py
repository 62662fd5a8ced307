"""The log of a run's receipts: a signed chain (`fednano.security.chain`) with one line a commit, rollback or purge.

Lines cut off at the end leave a valid shorter chain; the receipts that those lines were about show it, since each names
its own place in the log.
"""

from __future__ import annotations

from pathlib import Path

from fednano.security.canonical import sha256_hex
from fednano.security.chain import Chain
from fednano.security.keys import Signer
from fednano.unlearning.jobs.job import timestamp

__all__ = ["Ledger"]


class Ledger(Chain):
    """The log of one run.

    Args:
        path: the file.
        run: id of the run.
    """

    def __init__(self, path: Path, run: str) -> None:
        fields = frozenset({"job", "kind", "run", "sha256", "time"})
        super().__init__(path, "unlearning log", run, fields, "fednano unlearn run")

    def about(
        self, signer: Signer, kind: str, job: str, content: bytes, *, index: int, previous: str
    ) -> bytes:
        """A signed line about ``content`` (a receipt, a rollback, a purge), to be appended as number ``index``."""
        body = {
            "job": job,
            "kind": kind,
            "run": self.name,
            "sha256": sha256_hex(content),
            "time": timestamp(),
        }
        return self.line(signer, body, index=index, previous=previous)
