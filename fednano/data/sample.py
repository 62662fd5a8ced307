"""One question about one image, and a sequence of them.

A ``Dataset`` holds paths and strings only; an image is decoded when somebody asks for it. Fifty thousand
questions therefore cost a few megabytes, in every client process, whatever the images weigh. What is larger lies in
a memory-mapped file (`fednano.data.store`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from fednano.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_PIXELS", "BadRow", "Dataset", "Sample", "SampleView", "decode_image"]

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, in pixels (a quarter of a gigabyte as RGB): a small file can claim to be far
larger."""


def decode_image(path: Path) -> Image.Image:
    """Read an image file as RGB, upright.

    Transparent pixels are laid on white, because what lies under them is arbitrary. A photo's EXIF
    orientation is applied.

    Args:
        path: a PNG, JPEG or any other file that Pillow reads.

    Returns:
        A PIL image in mode ``RGB``, fully decoded, its file closed.

    Raises:
        DataError: the file is missing, is not an image, is cut off, or has more than ``MAX_PIXELS`` pixels.
            The message names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as raw:
            width, height = raw.size
            if width * height > MAX_PIXELS:
                raise DataError(
                    f"Image {path} has {width} x {height} pixels; at most {MAX_PIXELS} are decoded. "
                    "Scale it down, or remove its row from the data set."
                )
            raw.load()
            image = ImageOps.exif_transpose(raw)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layered = image.convert("RGBA")
                page = Image.new("RGBA", layered.size, (255, 255, 255, 255))
                page.alpha_composite(layered)
                image = page
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"Image {path} does not exist. Put the file there, or remove its row.") from error
    except (OSError, ValueError, SyntaxError, EOFError, Warning, Image.DecompressionBombError) as error:
        # Pillow reports damage under all of these names; a Warning arrives here only where warnings are
        # errors.
        raise DataError(
            f"Image {path} does not decode: {error}. Replace the file, or remove its row from the data set."
        ) from error


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        id: stable name, the same on every machine: ``"<data set>/<split>/<row>"``. Removal requests refer to
            it.
        image: path of the image file, or None for a text-only sample.
        question: what is asked.
        answer: the answer to learn and to be judged by.
        answers: all the answers people gave, where the data set has several (VQA has ten); empty means
            ``answer`` alone.
        history: what was said before, as (role, text) with the roles ``system``, ``user`` and ``assistant``; nothing
            of it is learnt.
        group: what the data is divided by, where that is a column of its own (``partition-by``); else empty.
    """

    id: str
    image: Path | None
    question: str
    answer: str
    answers: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    group: str = ""

    def load_image(self) -> Image.Image | None:
        """Decode the image.

        Returns:
            A PIL image in mode ``RGB``, or None for a text-only sample.

        Raises:
            DataError: the file does not decode; see ``decode_image``.
        """
        return None if self.image is None else decode_image(self.image)


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why.

    Attributes:
        file: the file that holds the row.
        line: line number, from 1.
        reason: what is wrong with it.
    """

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class SampleView(Sequence[Sample]):
    """Some rows of samples that stay where they are.

    Args:
        source: all samples.
        indices: which of them, each in ``[0, len(source))``.
    """

    def __init__(self, source: Sequence[Sample], indices: Sequence[int]) -> None:
        import numpy as np

        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)  # 8 bytes a sample, however many there are

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleView: ...
    def __getitem__(self, index: int | slice) -> Sample | SampleView:
        if isinstance(index, slice):
            return SampleView(self._source, self._indices[index].tolist())
        return self._source[int(self._indices[index])]


@dataclass(frozen=True)
class Dataset(Sequence[Sample]):
    """An ordered, read-only collection of samples.

    Attributes:
        name: for instance ``"easy-vqa"``.
        split: ``"train"`` or ``"test"``.
        samples: the samples, in the order of the source; a tuple, or rows of a memory-mapped file.
        bad_rows: rows of the source that were left out, with the reason. Whoever shows the data set to a user
            shows these too.
        kind: what the samples are, a name in `fednano.data.kinds.KINDS`.
    """

    name: str
    split: str
    samples: Sequence[Sample]
    bad_rows: tuple[BadRow, ...] = ()
    kind: str = "vqa"

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        return self.samples[index]

    @property
    def labels(self) -> tuple[str, ...]:
        """The answer of each sample, ``(len(self),)``: what partitions are skewed by."""
        return tuple(sample.answer for sample in self.samples)

    @property
    def groups(self) -> tuple[str, ...]:
        """The group of each sample, ``(len(self),)``: what partitions by a column divide by."""
        return tuple(sample.group for sample in self.samples)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The distinct answers, sorted."""
        return tuple(sorted({sample.answer for sample in self.samples}))

    def subset(self, indices: Iterable[int]) -> Dataset:
        """The samples at ``indices``, in that order.

        Args:
            indices: positions in this data set, each in ``[0, len(self))``.

        Raises:
            DataError: an index lies outside.
        """
        chosen = list(indices)
        outside = [i for i in chosen if not 0 <= i < len(self.samples)]
        if outside:
            raise DataError(
                f"Index {outside[0]} lies outside data set {self.name}/{self.split}, which has "
                f"{len(self.samples)} samples. "
                "Make the partition from this very data set."
            )
        return replace(self, samples=self.rows(chosen))

    def rows(self, indices: Sequence[int]) -> Sequence[Sample]:
        """The samples at ``indices``, each in ``[0, len(self))``: a tuple, or a view of the memory-mapped file."""
        if isinstance(self.samples, tuple):
            return tuple(self.samples[index] for index in indices)
        return SampleView(self.samples, indices)

    def fingerprint(self, *, images: bool = True) -> str:
        """Name of the content: two data sets with the same fingerprint train the same.

        Covers ids, questions, answers and order, and the bytes of the image files; not where the files lie.

        Args:
            images: hash the image files too. Each distinct file is read once; leave it out for data of many
                gigabytes.

        Returns:
            sha256 in hexadecimal, 64 characters.

        Raises:
            DataError: an image file cannot be read.
        """
        total = hashlib.sha256(b"fednano-dataset-1 images" if images else b"fednano-dataset-1 text")
        seen: dict[Path, str] = {}
        for sample in self.samples:
            picture = ""
            if sample.image is not None and images:
                if sample.image not in seen:
                    try:
                        seen[sample.image] = hashlib.sha256(sample.image.read_bytes()).hexdigest()
                    except OSError as error:
                        raise DataError(
                            f"Image {sample.image} cannot be read: {error.strerror}. "
                            "Put the file back, or remove its row from the data set."
                        ) from error
                picture = seen[sample.image]
            row = [
                sample.id,
                sample.image is not None,
                picture,
                sample.question,
                sample.answer,
                list(sample.answers),
                *([sample.history] if sample.history else []),
            ]
            total.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        return total.hexdigest()
