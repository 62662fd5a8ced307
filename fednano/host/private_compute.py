"""What a host computes for steps whose labels stay with their clients, and how many of them it keeps graphs of.

Steps of several clients go there in one pass, and back in one where their gradients come back together. Each then is a
`Half` of a `Group`: one graph, from which each takes its own rows.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fednano.errors import HostRefused
from fednano.host import codec
from fednano.host.compute import unpack
from fednano.host.jobs import Job, joined
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.language import LocalLLM
from fednano.models.language_inputs import IGNORE
from fednano.models.private import HiddenStep

__all__ = [
    "Graphs",
    "Group",
    "Half",
    "check_labelled",
    "decode_gradient",
    "encode_gradient",
    "forward_jobs",
    "private_job",
]


class Graphs:
    """Keeps the graphs of a few steps that wait for their gradients; the oldest is let go of first.

    Args:
        limit: how many; 0 keeps none, and every step is computed again on the way back.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._steps: OrderedDict[int, tuple[HiddenStep, int]] = OrderedDict()

    @property
    def open(self) -> bool:
        """Whether any are kept."""
        return self._limit > 0

    def add(self, step: HiddenStep, clients: int = 1) -> None:
        """Count the graph of a step, or of one of several clients, among those that are kept."""
        with self._lock:
            self._steps[id(step)] = step, clients
            while len(self._steps) > 1 and sum(count for _, count in self._steps.values()) > self._limit:
                self._steps.popitem(last=False)[1][0].forget()

    def remove(self, step: HiddenStep) -> None:
        """The step goes on, or its clients left."""
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


@dataclass(eq=False)
class Group:
    """Steps that went there in one pass.

    Attributes:
        step: their joint batch, with the graph if it is kept.
        clients: how many they are.
        labels: hidden states of all, N of them.
        seconds: what the way there took.
    """

    step: HiddenStep
    clients: int
    labels: int
    seconds: float

    def backward(self, gradients: Sequence[tuple[Half, Tensor]]) -> list[Tensor]:
        """The gradient ``(B, L, d)`` in the embeddings of each half from that ``(n, d)`` in its hidden states.

        Halves that are not here get none, and are computed again when theirs comes.
        """
        if self.clients == 1:
            return [self.step.backward(gradients[0][1])]
        whole = torch.zeros(self.labels, gradients[0][1].shape[1])
        for half, own in gradients:
            whole[half.labels] = own
        found = self.step.backward(whole)
        return [found[half.rows, : half.mask.shape[1]] for half, _ in gradients]


@dataclass(eq=False)
class Half:
    """One client's step between its two halves.

    Attributes:
        step: its own batch; the group's where it is alone.
        mask: ``(B, L)`` of its own batch.
        group: with whom it went there; ``None`` where no gradient will come.
        rows: its samples in the group's batch.
        labels: its hidden states among the group's.
    """

    step: HiddenStep
    mask: Tensor
    group: Group | None
    rows: slice
    labels: slice


def private_job(llm: LocalLLM, header: pb.PrivateHeader, buffer: codec.Assembler) -> Job:
    """The job of a step's first half; its reply is the half, and header and bytes of the hidden states.

    Args:
        llm: the model.
        header: of the request; its sizes have been checked.
        buffer: embeddings.

    Raises:
        HostRefused: the numbers are not acceptable.
    """
    packed = header.embeds
    x, mask = unpack(packed, buffer, llm.device)
    real = mask.flatten().nonzero().flatten()
    labelled = torch.full((mask.numel(),), IGNORE)
    labelled[real[list(header.labelled)]] = 0
    labelled = labelled.view(mask.shape)
    images = codec.images_of(packed)
    llm.check(x, mask, labelled, images=images)
    counts = (labelled == 0).sum(1).tolist()

    def finish(hidden: Tensor, half: Half) -> tuple[Half, pb.Packed, memoryview]:
        return half, *codec.pack(hidden, codec.wire_dtype(packed.dtype), counts)

    return Job(x, mask, labelled, "", header.want_gradient, finish, images)


def forward_jobs(
    keep: bool, llm: LocalLLM, jobs: list[Job], launched: Callable[[], None]
) -> list[tuple[Tensor, Half]]:
    """The first halves of several steps in one pass: hidden states ``(n, d)`` of each, and what it goes on with.

    Args:
        keep: hold on to the graph where gradients will come.
        llm: the model.
        jobs: at least one; all with or without gradients to come.
        launched: see `fednano.host.jobs.Compute`.
    """
    began = time.monotonic()
    want = jobs[0].want_gradient
    step = HiddenStep(llm.passes, *joined(jobs))
    hidden = step.states(keep=want and keep)
    launched()
    group = Group(step, len(jobs), len(hidden), time.monotonic() - began) if want else None
    found: list[tuple[Tensor, Half]] = []
    row = label = 0
    for job in jobs:
        rows = slice(row, row + len(job.mask))
        labels = slice(label, label + int((job.labels == 0).sum()))
        row, label = rows.stop, labels.stop
        own = HiddenStep(llm.passes, job.x, job.mask, job.labels, job.images) if len(jobs) > 1 else step
        found.append((hidden[labels], Half(own, job.mask, group, rows, labels)))
    return found


def decode_gradient(packed: pb.Packed, buffer: codec.Assembler) -> Tensor:
    """The gradient ``(n, d)`` in the hidden states, as it came.

    Raises:
        HostRefused: it is not finite.
    """
    dtype = codec.wire_dtype(packed.dtype)
    own = codec.decode_rows(buffer.take(len(buffer)), dtype, packed.hidden_size, packed.scale)
    if not bool(own.isfinite().all()):
        raise HostRefused(
            "gradient: got NaN or infinity, expected finite numbers (has the training diverged?)"
        )
    return own


def encode_gradient(half: Half, gradient: Tensor, packed: pb.Packed) -> tuple[pb.Packed, memoryview]:
    """Header and bytes of the gradient ``(B, L, d)`` in the embeddings that ``packed`` announced."""
    real = gradient.flatten(0, 1)[half.mask.flatten().to(gradient.device)]
    return codec.pack(real, codec.wire_dtype(packed.dtype), packed.lengths)
