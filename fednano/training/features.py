"""Connector features, computed once per image and kept as long as the encoder stays frozen.

Features are addressed by the image's content and the edge's fingerprint, so a changed image or another encoder can
never be served a stale entry. They live in memory up to a budget and, when a folder is given, in safetensors shards
that later processes of the same site read.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fednano.data import Sample, decode_image
from fednano.models.edge import EdgePart

__all__ = ["FeatureCache"]

_MEMORY_BYTES = 512 * 2**20
_WARM_SAMPLES = 4096


class FeatureCache:
    """Serve connector features of images, see `fednano.models.edge.EdgePart.encode`.

    Args:
        edge: the frozen edge that computes what is missing.
        folder: where shards are kept; ``None`` keeps features in memory only.
        batch_size: images encoded at a time.
        memory_bytes: budget of the in-memory part; the least recently used features leave first.
    """

    def __init__(
        self,
        edge: EdgePart,
        folder: Path | None = None,
        *,
        batch_size: int = 64,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        self._edge = edge
        self._folder = folder / edge.fingerprint[:16] if folder is not None else None
        self._batch_size = batch_size
        self._budget = memory_bytes
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._held = 0
        self._keys: dict[Path, str] = {}
        self._on_disk: dict[str, Path] = {}
        self._known_shards: set[Path] = set()
        self._reader: tuple[Path, Any] | None = None
        self.encoded = 0
        """Number of images that this object had to encode."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # features are personal data too
            self._scan()

    def get(self, samples: Sequence[Sample]) -> list[Tensor | None]:
        """Features of each sample's image, ``None`` for a sample without one.

        Raises:
            DataError: an image is missing or does not decode; the message names the file.
        """
        wanted = [self._key(sample.image) if sample.image is not None else None for sample in samples]
        found: dict[str, Tensor] = {}
        missing: dict[str, Path] = {}
        for sample, key in zip(samples, wanted, strict=True):
            if key is None or key in found or key in missing:
                continue
            held = self._lookup(key)
            if held is not None:
                found[key] = held
            else:
                assert sample.image is not None
                missing[key] = sample.image
        if missing and self._folder is not None:
            self._scan()  # another process of this site may have encoded them meanwhile
            for key in list(missing):
                held = self._lookup(key)
                if held is not None:
                    found[key] = held
                    del missing[key]
        if missing:
            found.update(self._encode(missing))
        return [found[key] if key is not None else None for key in wanted]

    def warm(self, samples: Sequence[Sample]) -> None:
        """Encode what is missing of the samples' images now and together, if the cache can hold it.

        A later `get` in small batches would encode just as few images at a time, and store a shard for each.

        Raises:
            DataError: see `get`.
        """
        for start in range(0, len(samples), _WARM_SAMPLES):
            self.get(samples[start : start + _WARM_SAMPLES])
            if self._folder is None and 2 * self._held > self._budget:
                return  # what came first would leave again before it is used

    def _key(self, image: Path) -> str:
        if image not in self._keys:
            from fednano.errors import DataError

            try:
                self._keys[image] = hashlib.sha256(image.read_bytes()).hexdigest()[:32]
            except OSError as error:
                raise DataError(f"the image {image} cannot be read: {error.strerror or error}.") from error
        return self._keys[image]

    def _lookup(self, key: str) -> Tensor | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        shard = self._on_disk.get(key)
        if shard is None:
            return None
        try:
            if self._reader is None or self._reader[0] != shard:  # to open one reads the names of all in it
                self._reader = shard, safe_open(str(shard), framework="pt")
            # A tensor as it comes keeps a mapping of the whole shard, and a process may have some 65,000 of those.
            features: Tensor = self._reader[1].get_tensor(key).clone()
        except (OSError, SafetensorError):
            self._reader = None
            del self._on_disk[key]  # a shard that vanished or was damaged is recomputed, not fatal
            return None
        self._remember(key, features)
        return features

    def _remember(self, key: str, features: Tensor) -> None:
        self._memory[key] = features
        self._held += features.nbytes
        while self._held > self._budget and len(self._memory) > 1:
            _, evicted = self._memory.popitem(last=False)
            self._held -= evicted.nbytes

    def _encode(self, missing: dict[str, Path]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        keys = list(missing)
        for start in range(0, len(keys), self._batch_size):
            part = keys[start : start + self._batch_size]
            features = self._edge.encode(self._edge.preprocess([decode_image(missing[key]) for key in part]))
            for key, row in zip(part, features, strict=True):
                result[key] = row.clone()
        self.encoded += len(keys)
        if self._folder is not None:
            self._store(result)
        for key, row in result.items():
            self._remember(key, row)
        return result

    def _store(self, features: dict[str, Tensor]) -> None:
        assert self._folder is not None
        handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".part")
        os.close(handle)
        save_file({key: value.cpu().contiguous() for key, value in features.items()}, temporary)
        digest = hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:24]
        shard = self._folder / f"{digest}.safetensors"
        Path(temporary).replace(shard)
        self._known_shards.add(shard)
        self._on_disk.update(dict.fromkeys(features, shard))

    def _scan(self) -> None:
        assert self._folder is not None
        for shard in sorted(self._folder.glob("*.safetensors")):
            if shard in self._known_shards:
                continue
            self._known_shards.add(shard)
            try:
                with safe_open(str(shard), framework="pt") as handle:
                    self._on_disk.update(dict.fromkeys(handle.keys(), shard))
            except (OSError, SafetensorError):
                continue

    @property
    def bytes_per_image(self) -> int:
        """Bytes of one image's features, 0 before the first image."""
        first = next(iter(self._memory.values()), None)
        return 0 if first is None else first.nbytes
