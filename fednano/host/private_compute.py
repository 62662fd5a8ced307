"""What a host does for a step whose labels stay with the client, and how many such steps it keeps graphs of."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fednano.errors import HostRefused
from fednano.host import codec
from fednano.host.compute import unpack
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.language import LocalLLM
from fednano.models.language_inputs import IGNORE
from fednano.models.private import HiddenStep

__all__ = ["Graphs", "PrivateStep", "check_labelled"]


class Graphs:
    """Keeps the graphs of a few steps that wait for their gradients; the oldest is let go of first.

    Args:
        limit: how many; 0 keeps none, and every step is computed again on the way back.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._steps: OrderedDict[int, HiddenStep] = OrderedDict()

    @property
    def open(self) -> bool:
        """Whether any are kept."""
        return self._limit > 0

    def add(self, step: HiddenStep) -> None:
        """Count a step's graph among those that are kept."""
        with self._lock:
            self._steps[id(step)] = step
            while len(self._steps) > self._limit:
                self._steps.popitem(last=False)[1].forget()

    def remove(self, step: HiddenStep) -> None:
        """The step goes on, or its client left."""
        with self._lock:
            self._steps.pop(id(step), None)


def check_labelled(places: Sequence[int], lengths: Sequence[int]) -> None:
    """Refuse labelled places that are not tokens, or samples without one after their first token.

    Raises:
        HostRefused: naming the place or sample.
    """
    if any(b <= a for a, b in itertools.pairwise(places)) or (places and places[-1] >= sum(lengths)):
        raise HostRefused(f"labelled: expected ascending places below {sum(lengths)}, the number of tokens")
    at, found = 0, set(places)
    for index, length in enumerate(lengths):
        if at in found:
            raise HostRefused(f"labelled: the first token of sample {index} cannot be predicted")
        if not any(at < place < at + length for place in found):
            raise HostRefused(f"labelled: sample {index} has no label after its first token; leave it out")
        at += length


class PrivateStep:
    """One step between its two halves.

    Args:
        llm: the model.
        header: of the request; its sizes have been checked.
        buffer: embeddings.

    Raises:
        HostRefused: the numbers are not acceptable.
    """

    def __init__(self, llm: LocalLLM, header: pb.PrivateHeader, buffer: codec.Assembler) -> None:
        self._packed = header.embeds
        x, self._mask = unpack(header.embeds, buffer, llm.device)
        real = self._mask.flatten().nonzero().flatten()
        labelled = torch.full((self._mask.numel(),), IGNORE)
        labelled[real[list(header.labelled)]] = 0
        labelled = labelled.view(self._mask.shape)
        images = codec.images_of(header.embeds)
        llm.check(x, self._mask, labelled, images=images)
        self._counts = (labelled == 0).sum(1).tolist()
        self.step = HiddenStep(llm.passes, x, self._mask, labelled, images)

    def forward(self, *, keep: bool) -> tuple[pb.Packed, memoryview]:
        """Header and bytes of the hidden states."""
        return codec.pack(self.step.states(keep=keep), codec.wire_dtype(self._packed.dtype), self._counts)

    def backward(self, packed: pb.Packed, buffer: codec.Assembler) -> tuple[pb.Packed, memoryview]:
        """Header and bytes of the gradient in the embeddings.

        Raises:
            HostRefused: the gradient is not finite.
        """
        dtype = codec.wire_dtype(packed.dtype)
        own = codec.decode_rows(buffer.take(len(buffer)), dtype, packed.hidden_size, packed.scale)
        if not bool(own.isfinite().all()):
            raise HostRefused(
                "gradient: got NaN or infinity, expected finite numbers (has the training diverged?)"
            )
        gradient: Tensor = self.step.backward(own)
        real = gradient.flatten(0, 1)[self._mask.flatten().to(gradient.device)]
        return codec.pack(real, codec.wire_dtype(self._packed.dtype), self._packed.lengths)
