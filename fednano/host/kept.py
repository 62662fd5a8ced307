"""Frozen parts of samples that a host keeps for its clients: on the GPU, in memory, on disk, then not at all.

A client names a sample by a hash of its content and the host computes the hash again, so nobody can put one thing under
another's name. Each bearer of a token has a room of its own: what one client keeps, another can neither use nor ask
about. Whatever is dropped is sent again when a step misses it, so dropping is never wrong, only slow.

The GPU has copies of what lies in one of the other places, of those samples that were used last.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fednano.errors import ConfigError

__all__ = ["KeptSample", "KeptSamples"]


@dataclass(frozen=True)
class KeptSample:
    """The frozen part of one sample of L tokens.

    Attributes:
        rows: ``(L, d)`` embeddings before the adapters.
        labels: ``(L,)`` int32.
        streams: ``(L,)`` uint8: 1 + the stream's index, 0 for none.
        images: ``(n, 3)`` int32: start, height and width of each image, as `fednano.models.images.ImageSpan`.
    """

    rows: Tensor
    labels: Tensor
    streams: Tensor
    images: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.rows.nbytes + self.labels.nbytes + self.streams.nbytes + self.images.nbytes


class KeptSamples:
    """A bounded store, least recently used first out. Safe from several threads.

    Args:
        memory_bytes: most bytes in memory.
        disk_bytes: most bytes in a temporary folder; 0 keeps nothing on disk.
        gpu_bytes: most bytes on the model's device; 0 keeps nothing there.

    Raises:
        ConfigError: a negative number.
    """

    def __init__(self, memory_bytes: int = 2 << 30, disk_bytes: int = 0, gpu_bytes: int = 0) -> None:
        if min(memory_bytes, disk_bytes, gpu_bytes) < 0:
            raise ConfigError(
                f"kept bytes: got {memory_bytes}, {disk_bytes} and {gpu_bytes}, expected 0 or more"
            )
        self._limits, self._gpu_limit = (memory_bytes, disk_bytes), gpu_bytes
        self._lock = threading.Lock()
        self._gpu: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()
        self._gpu_held = 0
        self._memory: OrderedDict[tuple[str, bytes], KeptSample] = OrderedDict()
        self._disk: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        self._held = [0, 0]
        self._folder: Path | None = None

    def put(self, room: str, key: bytes, sample: KeptSample) -> None:
        """Keep a sample, and let go of others if there is no place."""
        with self._lock:
            self._forget((room, key))
            self._insert((room, key), sample)

    def get(self, room: str, key: bytes) -> KeptSample | None:
        """A kept sample, or ``None``."""
        name = (room, key)
        with self._lock:
            if name in self._memory:
                self._memory.move_to_end(name)
                return self._memory[name]
            if name not in self._disk:
                return None
            try:
                tensors = load_file(self._file(name))
            except OSError:
                self._forget(name)
                return None
            sample = KeptSample(**tensors)
            self._leave_disk(name)
            self._insert(name, sample)
            return sample

    def rows(self, room: str, key: bytes, sample: KeptSample, move: Callable[[Tensor], Tensor]) -> Tensor:
        """A sample's rows ``(L, d)`` where ``move`` brings them; from there if they are there already.

        Args:
            room: whose they are.
            key: name of the sample.
            sample: from `get`.
            move: brings a tensor to the model's device, on the thread and stream at hand.
        """
        name = (room, key)
        with self._lock:
            if (found := self._gpu.get(name)) is not None:
                self._gpu.move_to_end(name)
                return found
        moved = move(sample.rows)
        if moved.nbytes > self._gpu_limit:
            return moved
        with self._lock:
            if name not in self._gpu and (name in self._memory or name in self._disk):
                self._gpu[name] = moved
                self._gpu_held += moved.nbytes
                while self._gpu_held > self._gpu_limit:
                    self._gpu_held -= self._gpu.popitem(last=False)[1].nbytes
        return moved

    def counters(self) -> dict[str, int]:
        """How much is kept, and where."""
        with self._lock:
            return {
                "kept_samples": len(self._memory) + len(self._disk),
                "kept_memory_bytes": self._held[0],
                "kept_disk_bytes": self._held[1],
                "kept_gpu_bytes": self._gpu_held,
            }

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._memory.clear()
            self._disk.clear()
            self._gpu.clear()
            self._held, self._gpu_held = [0, 0], 0
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    def _insert(self, name: tuple[str, bytes], sample: KeptSample) -> None:
        self._memory[name] = sample
        self._held[0] += sample.nbytes
        while self._held[0] > self._limits[0] and self._memory:
            old, dropped = self._memory.popitem(last=False)
            self._held[0] -= dropped.nbytes
            if not self._spill(old, dropped):
                self._leave_gpu(old)

    def _spill(self, name: tuple[str, bytes], sample: KeptSample) -> bool:
        """Write a sample to the disk; whether it is there now."""
        if sample.nbytes > self._limits[1]:
            return False
        while self._held[1] + sample.nbytes > self._limits[1]:
            self._forget(next(iter(self._disk)))
        tensors = {field.name: getattr(sample, field.name).cpu() for field in fields(sample)}
        try:
            save_file(tensors, self._file(name))
        except OSError:
            return False  # a full disk is one more reason to drop it
        self._disk[name] = sample.nbytes
        self._held[1] += sample.nbytes
        return True

    def _forget(self, name: tuple[str, bytes]) -> None:
        if (kept := self._memory.pop(name, None)) is not None:
            self._held[0] -= kept.nbytes
        self._leave_disk(name)
        self._leave_gpu(name)

    def _leave_disk(self, name: tuple[str, bytes]) -> None:
        if (size := self._disk.pop(name, None)) is not None:
            self._held[1] -= size
            self._file(name).unlink(missing_ok=True)

    def _leave_gpu(self, name: tuple[str, bytes]) -> None:
        if (copy := self._gpu.pop(name, None)) is not None:
            self._gpu_held -= copy.nbytes

    def _file(self, name: tuple[str, bytes]) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fednano-kept-"))
        room, key = name
        return self._folder / f"{hashlib.sha256(room.encode() + b'/' + key).hexdigest()}.safetensors"
