"""A run folder: everything that one run leaves behind. ``README.md`` beside this file lists the files.

``RunFolder.create`` makes ``runs/<id>/`` and lets ``runs/latest`` point to it. Every file in it is written in
one step, except the two logs (``metrics.jsonl``, ``events.jsonl``), which grow by whole lines.
"""

from __future__ import annotations

import re
import shlex
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fednano.errors import RunError
from fednano.runs import checkpoints as _checkpoints
from fednano.runs.atomic import disk_advice, inside, read_json, write_bytes, write_json
from fednano.runs.metrics import JsonLines, check_metrics, read_json_lines

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from fednano.runs.summary import Summary

__all__ = ["RunFolder"]

LATEST = "latest"
_SECRET = re.compile(r"(^|_)(token|secret|password|passphrase|api_key|private_key)$", re.IGNORECASE)


class RunFolder:
    """The files of one run.

    Use ``RunFolder.create`` for a new run and ``RunFolder.open`` for an existing one.

    Attributes:
        path: the folder, absolute.
        id: its name, for instance ``"20260131-142501-easy-vqa"``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.id = self.path.name
        self._metrics = JsonLines(self.path / "metrics.jsonl")
        self._events = JsonLines(self.path / "events.jsonl")

    @classmethod
    def create(
        cls,
        root: str | Path = "runs",
        name: str = "run",
        config: Mapping[str, Any] | None = None,
        *,
        command: Sequence[str] | None = None,
        now: datetime | None = None,
    ) -> RunFolder:
        """Make the folder of a new run and let ``latest`` point to it. An existing run is never written over.

        Args:
            root: the folder that holds all runs; made if needed.
            name: a short word for people; other characters than letters, digits and ``-`` are replaced.
            config: flat settings, written to ``config.json``. Values whose key says that they are secret
                (``..._token``, ``..._password``, ...) are replaced by ``"(hidden)"``.
            command: the command line that repeats the run, word by word; written to ``config.json`` as
                ``"command"``.
            now: the time in the id; the present by default.

        Raises:
            RunError: the folder cannot be made.
        """
        base = Path(root)
        stamp = (now or datetime.now(UTC)).astimezone(UTC)
        word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "run"
        identity = f"{stamp:%Y%m%d-%H%M%S}-{word}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            for attempt in range(1, 1000):
                path = base / (identity if attempt == 1 else f"{identity}-{attempt}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                break
            else:
                raise RunError(f"A thousand runs named {identity} exist in {base}. Choose another name.")
        except OSError as error:
            raise RunError(f"Cannot make a run folder in {base}: {disk_advice(base, 0, error)}") from error
        run = cls(path)
        settings = {
            key: "(hidden)" if _SECRET.search(key) else value for key, value in (config or {}).items()
        }
        settings["created"] = f"{stamp:%Y-%m-%dT%H:%M:%SZ}"
        if command is not None:
            settings["command"] = shlex.join(command)
        run.write_json("config.json", settings)
        _point_latest(base, run.id)
        return run

    @classmethod
    def open(cls, run: str | Path = LATEST, *, root: str | Path = "runs") -> RunFolder:
        """Open an existing run.

        Args:
            run: a run's id below ``root``, ``"latest"``, or the path of a run folder.
            root: the folder that holds all runs.

        Raises:
            RunError: there is no such run. The message names the newest ones that there are.
        """
        base = Path(root)
        for candidate in (base / run, Path(run)):
            path = _follow(candidate)
            if (path / "config.json").is_file():
                return cls(path)
        known = sorted(
            path.parent.name for path in base.glob("*/config.json") if not path.parent.is_symlink()
        )
        listed = f"The newest there: {', '.join(known[-5:])}." if known else "There are no runs there."
        raise RunError(
            f"There is no run {str(run)!r} in {base.resolve()}. {listed} Give an id, 'latest', or a path."
        )

    # single files

    def file(self, name: str | Path) -> Path:
        """The path of a file of this run; it need not exist.

        Raises:
            RunError: ``name`` leads outside of the run folder.
        """
        return inside(self.path, name)

    def write_json(self, name: str, value: object) -> Path:
        """Write ``value`` as JSON in one step; floats that are not finite become null. Raises ``RunError``."""
        path = self.file(name)
        write_json(path, value)
        return path

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this run. Raises ``RunError`` where it is missing or damaged."""
        return read_json(self.file(name))

    def config(self) -> dict[str, Any]:
        """The settings of the run, as ``config.json`` holds them."""
        value = self.read_json("config.json")
        if not isinstance(value, dict):
            raise RunError(f"{self.path / 'config.json'} does not hold an object. Restore it from a backup.")
        return value

    def save_image(self, name: str, image: Image.Image) -> str:
        """Save a picture as ``images/<name>.png``.

        Returns:
            Its path relative to the run folder, for ``predictions.json``.
        """
        import io

        relative = f"images/{name}.png"
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        write_bytes(self.file(relative), buffer.getvalue())
        return relative

    def write_summary(self, summary: Summary) -> Path:
        """Write ``summary.json``."""
        return self.write_json("summary.json", summary.to_json())

    # -- logs
    # -----------------------------------------------------------------------------------------------------

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one measurement to ``metrics.jsonl``; safe from several threads.

        Args:
            record: ``phase``, ``round``, ``scope`` (``"global"`` | ``"client"``), ``client`` with the latter,
                and any of ``loss``, ``accuracy``, ``samples``, ``seconds``, ``bytes`` (mapping), ``refused``
                (reason). Floats that are not finite become null and are named in ``non_finite``.

        Raises:
            RunError: the record cannot be placed, is no JSON, or the disk is full.
        """
        check_metrics(record)
        self._metrics.append(record)

    def metrics(self) -> list[dict[str, Any]]:
        """All measurements so far, in the order they were appended; a torn last line is left out."""
        return read_json_lines(self.path / "metrics.jsonl")

    def append_event(self, level: str, text: str) -> None:
        """Append a message for the report (``level``: ``"info"``, ``"warning"`` or ``"error"``) to
        ``events.jsonl``."""
        self._events.append({"time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "level": level, "text": text})

    def events(self) -> list[dict[str, Any]]:
        """All messages so far."""
        return read_json_lines(self.path / "events.jsonl")

    def close(self) -> None:
        """Close the logs. The object can still be used; a later append opens them again."""
        self._metrics.close()
        self._events.close()

    # -- tensors
    # --------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        number: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        keep_last: int = 3,
        phase: str | None = None,
    ) -> Path:
        """Save the state after round ``number`` in ``checkpoints/``, or ``checkpoints/<phase>/`` where a
        phase is named.

        See ``fednano.runs.checkpoints.save_checkpoint``.
        """
        return _checkpoints.save_checkpoint(
            self._checkpoint_folder(phase), number, tensors, state, score=score, keep_last=keep_last
        )

    def load_checkpoint(
        self, number: int | None = None, *, phase: str | None = None
    ) -> _checkpoints.Checkpoint:
        """Load the checkpoint of a round, the newest by default. See ``fednano.runs.checkpoints``."""
        return _checkpoints.load_checkpoint(self._checkpoint_folder(phase), number)

    def checkpoints(self, *, phase: str | None = None) -> list[int]:
        """The rounds that have a checkpoint, ascending."""
        return _checkpoints.list_checkpoints(self._checkpoint_folder(phase))

    def save_adapter(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
        """Save the final adapter: ``adapter.safetensors`` and ``adapter.json``, which holds ``info`` and the
        tensors' sha256.

        Args:
            tensors: name -> tensor, of any shape.
            info: what is needed to rebuild the adapter (name, options, sites, basis fingerprint).
        """
        import hashlib

        payload = _checkpoints.pack(tensors)
        path = self.file(_checkpoints.TENSORS)
        write_bytes(path, payload)
        self.write_json("adapter.json", {**info, "sha256": hashlib.sha256(payload).hexdigest()})
        return path

    def load_adapter(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Load the final adapter.

        Returns:
            ``(tensors, info)`` as given to ``save_adapter``; ``info`` holds ``sha256`` besides.

        Raises:
            RunError: the run has no final adapter yet, or it is damaged.
        """
        import hashlib

        from safetensors.torch import load

        info = self.read_json("adapter.json")
        # An unlearning commit lets adapter.json point to the new tensors first: that one rename is the commit.
        own = info.pop("file", _checkpoints.TENSORS) if isinstance(info, dict) else _checkpoints.TENSORS
        try:
            payload = self.file(str(own)).read_bytes()
        except OSError as error:
            raise RunError(
                f"Run {self.id} has no final adapter: {error.strerror}. Let the run finish first."
            ) from error
        if not isinstance(info, dict) or hashlib.sha256(payload).hexdigest() != info.get("sha256"):
            raise RunError(
                f"The adapter of run {self.id} is damaged: its sha256 is not the one in adapter.json. "
                f"Take the newest checkpoint instead: rounds {self.checkpoints()}."
            )
        tensors: dict[str, Tensor] = load(payload)
        return tensors, info

    def _checkpoint_folder(self, phase: str | None) -> Path:
        if phase is None:
            return self.path / "checkpoints"
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", phase):
            raise RunError(
                f"Phase {phase!r} cannot name a folder; use lower-case letters, digits, '_' and '-'."
            )
        return self.path / "checkpoints" / phase


def _point_latest(base: Path, identity: str) -> None:
    """Let ``base/latest`` name the run: a symbolic link, or a text file with the id where links are not
    allowed."""
    link = base / LATEST
    if link.is_dir() and not link.is_symlink():
        raise RunError(
            f"{link} is a folder, but that name is kept for a pointer to the newest run. Rename the folder."
        )
    temporary = base / f".{LATEST}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.symlink_to(identity, target_is_directory=True)
        temporary.replace(link)
    except (OSError, NotImplementedError):
        # Windows grants symbolic links to administrators and developers only.
        temporary.unlink(missing_ok=True)
        write_bytes(link, identity.encode() + b"\n")


def _follow(path: Path) -> Path:
    """Resolve a pointer that is a text file."""
    if path.name == LATEST and path.is_file():
        return path.parent / Path(path.read_text(encoding="utf-8").strip()).name
    return path
