"""The folder of runs as a whole: which there are, and whether anything changed."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

from fednano.board.runs import Watched

__all__ = ["Observer"]

_LISTED = (
    "id",
    "created",
    "status",
    "model",
    "dataset",
    "adapter",
    "rule",
    "round",
    "total",
    "scores",
    "metric",
)
_MOST = 500


class Observer:
    """Watches the runs of a folder, which may be missing, empty, or growing. Safe from several threads.

    Args:
        root: the folder that holds all runs.
    """

    def __init__(self, root: Path) -> None:
        self._name = str(root)
        self.root = root.absolute()
        self._lock = threading.Lock()
        self._runs: dict[str, Watched] = {}

    def state(self, run: str = "", *, known: str = "") -> tuple[str, dict[str, Any] | None]:
        """Everything the page shows.

        Args:
            run: id of the run to tell everything about; the newest by default.
            known: the version that the caller holds.

        Returns:
            ``(version, state)``; the state is None where ``known`` is still the version.
        """
        with self._lock:
            signatures = self._look()
            chosen = run if run in signatures else next(iter(signatures), "")
            details = {name: self._runs[name].details(each) for name, each in signatures.items()}
            told = [{key: details[name][key] for key in _LISTED} for name in signatures]
            # The status depends on the time too, so that it belongs to the version.
            marks = repr((chosen, run, sorted(signatures.items()), [each["status"] for each in told]))
            version = hashlib.sha256(marks.encode()).hexdigest()[:32]
            if version == known:
                return version, None
            return version, {
                "folder": self._name,
                "exists": self.root.is_dir(),
                "runs": told,
                "asked": run,
                "run": details.get(chosen),
            }

    def folder(self, run: str) -> Path | None:
        """The folder of a run by its id; None where there is no such run below the root."""
        with self._lock:
            self._look()
            watched = self._runs.get(run)
        return watched.path if watched else None

    def _look(self) -> dict[str, tuple[Any, ...]]:
        """Signatures of the runs there are, newest first."""
        names = []
        try:
            for path in self.root.iterdir():
                # Links are left out: 'latest' is one, and another might lead out of the folder.
                if not path.is_symlink() and path.is_dir() and (path / "config.json").is_file():
                    names.append(path.name)
        except OSError:
            pass
        names = sorted(names, reverse=True)[:_MOST]
        for gone in set(self._runs) - set(names):
            del self._runs[gone]
        for name in names:
            self._runs.setdefault(name, Watched(self.root / name))
        return {name: self._runs[name].signature() for name in names}
