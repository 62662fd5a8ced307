"""What a codec is; the codecs that keep every element in half precision or not at all; helpers of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fednano.aggregation.update import Leaves, Refusal
from fednano.errors import TrainingDiverged

__all__ = ["BF16", "F32", "FP16", "U8", "Codec", "as_bytes", "checked_scales"]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Codec:
    """Encodes nothing: changes travel as float32. The other codecs replace ``pack``, ``unpack`` and ``nbytes``.

    Attributes:
        feedback: carry what the encoding lost into the next round.
        last: the codec of a run's last round, by name; empty: the same. After it nothing can be carried on, so a finer
            one there settles what all rounds before have lost.
    """

    feedback: bool = False
    last: str = ""

    name: ClassVar[str] = "none"

    def encode(
        self, leaves: Leaves, current: Leaves, carry: Mapping[str, Tensor] | None = None
    ) -> tuple[Leaves, Leaves]:
        """On the client: payloads of the changes, and what to carry to the next round.

        Args:
            leaves: trained leaves.
            current: the leaves the client started from, same names and shapes.
            carry: what the round before carried, same shapes; None at the first.

        Returns:
            Name to ``uint8`` payload, 1-D; and name to what was lost, float32, empty without feedback.

        Raises:
            TrainingDiverged: a change is not finite, so that no payload can stand for it.
        """
        payloads, lost = {}, {}
        for name, leaf in leaves.items():
            change = (leaf.detach().double() - current[name].detach().double()).float()
            if carry and name in carry:
                change = change + carry[name]
            values: F32 = change.numpy()
            if not np.isfinite(values).all():
                raise TrainingDiverged(
                    f"codec {self.name!r}: the change of leaf {name} is not finite; nothing is sent"
                )
            payload = self.pack(values)
            payloads[name] = torch.from_numpy(payload)
            if self.feedback:
                lost[name] = torch.from_numpy(values - self.unpack(payload, values.shape))
        return payloads, lost

    def decode(self, payloads: Leaves, current: Leaves) -> Leaves:
        """In the aggregator: the leaves the payloads stand for, in the dtypes of ``current``.

        Args:
            payloads: name to ``uint8``, 1-D.
            current: the leaves the client started from; their shapes are the leaves' shapes.

        Raises:
            Refusal: "codec" when a payload is of the wrong dtype or length, or holds impossible values; "schema"
                when it belongs to an unknown leaf.
        """
        out = {}
        for name, payload in payloads.items():
            if name not in current:
                raise Refusal("schema", f"unknown leaf {name}")
            shape = tuple(current[name].shape)
            if payload.dtype != torch.uint8 or payload.ndim != 1 or payload.numel() != self.nbytes(shape):
                raise Refusal(
                    "codec",
                    f"payload of {name} is {payload.dtype} {tuple(payload.shape)}, "
                    f"expected {self.nbytes(shape)} bytes of codec {self.name!r}",
                )
            with np.errstate(over="ignore"):  # what is not finite is refused with the update
                change = torch.from_numpy(self.unpack(payload.contiguous().numpy(), shape))
            out[name] = (current[name].double() + change.double()).to(current[name].dtype)
        return out

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact length of a leaf's payload."""
        return 4 * math.prod(shape)

    def pack(self, values: F32) -> U8:
        """Bytes of one change, 1-D."""
        return as_bytes(values)

    def unpack(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """The change that a payload of the right length stands for."""
        return payload.view(np.float32).reshape(shape).copy()


def as_bytes(array: npt.NDArray[Any]) -> U8:
    """The memory of an array, 1-D."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def checked_scales(scales: F32) -> F32:
    """Scales as they came; Refusal when one is negative or not finite."""
    if not np.isfinite(scales).all() or (scales < 0).any():
        raise Refusal("codec", "a payload holds a scale that is negative or not finite")
    return scales


@dataclass(frozen=True)
class _Half(Codec):
    """Two bytes an element."""

    kind: ClassVar[torch.dtype] = torch.bfloat16

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """See `Codec.nbytes`."""
        return 2 * math.prod(shape)

    def pack(self, values: F32) -> U8:
        """See `Codec.pack`."""
        top = torch.finfo(self.kind).max
        half = torch.from_numpy(values).clamp(-top, top).to(self.kind)
        return as_bytes(half.contiguous().view(torch.int16).numpy())

    def unpack(self, payload: U8, shape: tuple[int, ...]) -> F32:
        """See `Codec.unpack`."""
        half = torch.from_numpy(payload.view(np.int16).copy()).view(self.kind)
        out: F32 = half.float().reshape(shape).numpy()
        return out


@dataclass(frozen=True)
class BF16(_Half):
    """bfloat16."""

    name: ClassVar[str] = "bf16"


@dataclass(frozen=True)
class FP16(_Half):
    """IEEE half precision, saturating."""

    name: ClassVar[str] = "fp16"
    kind: ClassVar[torch.dtype] = torch.float16
