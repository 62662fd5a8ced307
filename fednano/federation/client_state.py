"""What a client must remember from round to round: on its own disk, one file a round, written whole or not at all.

SCAFFOLD's control variates, the error that an uplink codec left behind, personal leaves: none of it reaches the
server. A file belongs to the round that wrote it. The server says in each request which of the client's updates was the
last one it merged, and the client goes on from the file of that round; what it wrote for an update that was refused,
lost or killed with the server never happened. So a resumed run ends at the bits of the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fednano.errors import RunError
from fednano.federation.messages import Instruction
from fednano.runs.atomic import disk_advice, write_bytes

__all__ = ["ClientState", "state_of"]

_NAME = re.compile(r"round-(\d{4,})\.safetensors")


class ClientState:
    """One client's memory in one phase of one run.

    Args:
        root: the folder under which this machine keeps the memories of clients.
        run: id of the run.
        phase: the phase, such as ``"federated"``.
        client: the client's name; any text.
    """

    def __init__(self, root: Path, run: str, phase: str, client: str) -> None:
        self.folder = root / "clients" / _word(run) / _word(phase) / _word(client)

    def load(self, accepted: int) -> dict[str, Tensor]:
        """What the client knew after its update of round ``accepted``; nothing for round 0.

        Raises:
            RunError: the file is gone or damaged.
        """
        if accepted == 0:
            return {}
        path = self._path(accepted)
        try:
            tensors: dict[str, Tensor] = load(path.read_bytes())
        except (OSError, SafetensorError, ValueError) as error:
            raise RunError(
                f"this client's memory of round {accepted} cannot be read ({path}: {error}); without it, it cannot go "
                "on in this run. Restore the file from a backup, or leave the client out."
            ) from error
        return tensors

    def save(self, number: int, tensors: Mapping[str, Tensor], accepted: int) -> None:
        """Keep what the client knows after training in round ``number``, and forget what nobody can ask for again.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # trained on the client's own data
        except OSError as error:
            raise RunError(
                f"cannot make {self.folder}: {disk_advice(self.folder.parent, 0, error)}"
            ) from error
        write_bytes(self._path(number), save(content))
        for path in self.folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found and int(found.group(1)) not in (number, accepted):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:04d}.safetensors"


def _word(name: str) -> str:
    """A name as one safe path component; different names stay different."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:48]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def state_of(instruction: Instruction, node: Mapping[str, Any], name: str) -> ClientState:
    """Where a client remembers: the folder ``state`` of its node configuration, else the run's cache folder."""
    root = str(node.get("state", "")) or instruction.config.cache_dir or "cache"
    return ClientState(Path(root), instruction.run, instruction.phase, name)
