"""Steps as the device sees them: a batch to compute, and what becomes of its losses and gradient.

Whatever the exchange, a request becomes a `Job`; jobs of different clients are computed in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fednano.host.proto import language_host_pb2 as pb
from fednano.models.images import Images
from fednano.models.language import LocalLLM
from fednano.models.language_inputs import IGNORE

__all__ = ["Compute", "Job", "Outcome", "Reply", "compute_jobs", "joined"]

Reply: TypeAlias = tuple[pb.StepResult, list[memoryview]]
"""A reply's header, and the bytes that follow it."""

Outcome: TypeAlias = tuple[Tensor, Tensor | None]
"""Losses ``(B,)`` and, if wanted, the gradient ``(B, L, d)`` of their sum, on the device."""


@dataclass(frozen=True)
class Job:
    """One request as tensors; checked.

    Attributes:
        x: ``(B, L, d)`` on the model's device, zeros as padding, which is right.
        mask: ``(B, L)`` on the CPU.
        labels: ``(B, L)`` on the CPU.
        objective: name of the token loss.
        want_gradient: whether to go backward.
        finish: makes the reply of the outcome.
        images: of each sample.
    """

    x: Tensor
    mask: Tensor
    labels: Tensor
    objective: str
    want_gradient: bool
    finish: Callable[..., Any]
    images: Images = ()


Compute: TypeAlias = Callable[[LocalLLM, list[Job], Callable[[], None]], Sequence[tuple[Any, ...]]]
"""Computes several jobs of a kind in one pass: what `Job.finish` of each is called with. The last argument is called
when the device has been told the way there."""


def compute_jobs(
    llm: LocalLLM, jobs: Sequence[Job], launched: Callable[[], None] | None = None
) -> list[Outcome]:
    """Several requests in one pass; all of one objective, all with or without gradients.

    Args:
        llm: the model.
        jobs: at least one.
        launched: see `Passes.compute`.

    Raises:
        HostRefused, ConfigError: what only the computation can find.
        MemoryError, torch.OutOfMemoryError: they do not fit into memory.
    """
    first = jobs[0]
    x, mask, labels, images = joined(jobs)
    losses, gradient = llm.passes.compute(
        x, mask, labels, first.objective, first.want_gradient, images, launched or _nothing
    )
    outcomes: list[Outcome] = []
    at = 0
    for job in jobs:
        rows = slice(at, at + len(job.mask))
        at += len(job.mask)
        outcomes.append((losses[rows], None if gradient is None else gradient[rows, : job.mask.shape[1]]))
    return outcomes


def joined(jobs: Sequence[Job]) -> tuple[Tensor, Tensor, Tensor, Images]:
    """The samples of all jobs as one batch: x ``(B, L, d)``, mask and labels ``(B, L)``, images."""
    if len(jobs) == 1:
        return jobs[0].x, jobs[0].mask, jobs[0].labels, jobs[0].images
    longest = max(job.x.shape[1] for job in jobs)
    x = torch.cat([_widen(job.x, longest, 0.0) for job in jobs])
    mask = torch.cat([_widen(job.mask, longest, False) for job in jobs])
    labels = torch.cat([_widen(job.labels, longest, IGNORE) for job in jobs])
    images: Images = ()
    if any(job.images for job in jobs):
        images = [spans for job in jobs for spans in (job.images or [()] * len(job.mask))]
    return x, mask, labels, images


def _nothing() -> None:
    pass


def _widen(part: Tensor, length: int, fill: float) -> Tensor:
    """``(B, L, ...)`` padded on the right to ``(B, length, ...)``."""
    if part.shape[1] == length:
        return part
    wide = part.new_full((part.shape[0], length, *part.shape[2:]), fill)
    wide[:, : part.shape[1]] = part
    return wide
