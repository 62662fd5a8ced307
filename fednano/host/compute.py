"""What a worker thread does with a received request: bytes to tensors, the model, tensors to bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fednano.errors import ConfigError, HostRefused
from fednano.host import codec
from fednano.host.names import LABEL_BYTES
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.language import Generation, LocalLLM
from fednano.models.language_inputs import IGNORE

__all__ = ["StepReply", "begin_generation", "compute_step", "compute_steps"]

StepReply: TypeAlias = tuple[pb.StepResult, memoryview]
"""A reply's header, and the bytes of the gradient."""

_NOT_COMPUTED = HostRefused("not computed")


@dataclass(frozen=True)
class _Step:
    """A request as tensors: ``x`` ``(B, L, d)``, ``mask`` and ``labels`` ``(B, L)``, padded right."""

    header: pb.StepHeader
    x: Tensor
    mask: Tensor
    labels: Tensor


def compute_step(llm: LocalLLM, header: pb.StepHeader, buffer: codec.Assembler) -> StepReply:
    """Losses of one request and, if it wants one, the gradient of their sum.

    Args:
        llm: the model.
        header: of the request; its sizes have been checked.
        buffer: embeddings and labels.

    Returns:
        The reply's header, and the bytes of the gradient (none if it is not wanted).

    Raises:
        HostRefused: the numbers are not acceptable (non-finite, ids out of range).
        ConfigError: unknown objective.
    """
    (reply,) = compute_steps(llm, [(header, buffer)])
    if isinstance(reply, Exception):
        raise reply
    return reply


def compute_steps(
    llm: LocalLLM, requests: Sequence[tuple[pb.StepHeader, codec.Assembler]]
) -> list[StepReply | Exception]:
    """Several requests in one pass; all of one objective, all with or all without gradients.

    Args:
        llm: the model.
        requests: header and buffer of each; sizes have been checked.

    Returns:
        For each request its reply, or the error that its own numbers are to blame for.
    """
    replies: list[StepReply | Exception] = [_NOT_COMPUTED] * len(requests)
    joined: dict[int, _Step] = {}
    for index, (header, buffer) in enumerate(requests):
        try:
            step = _Step(header, *_unpack_step(header, buffer))
            if len(requests) > 1:  # a lone request is checked by the model itself
                llm.check(step.x, step.mask, step.labels, header.objective)
            joined[index] = step
        except (HostRefused, ConfigError) as error:
            replies[index] = error
    if not joined:
        return replies
    steps = list(joined.values())
    first, longest = steps[0].header, max(step.x.shape[1] for step in steps)
    x = torch.cat([_widen(step.x, longest, 0.0) for step in steps])
    mask = torch.cat([_widen(step.mask, longest, False) for step in steps])
    labels = torch.cat([_widen(step.labels, longest, IGNORE) for step in steps])
    try:
        losses, gradient = llm.loss_and_gradient(x, mask, labels, first.objective, first.want_gradient)
    except (HostRefused, ConfigError) as error:
        if len(requests) > 1:
            raise
        return [error]
    at = 0
    for index, step in joined.items():
        rows = slice(at, at + len(step.mask))
        at += len(step.mask)
        result, data = pb.StepResult(losses=losses[rows].tolist()), memoryview(b"")
        if gradient is not None:
            packed = step.header.embeds
            own = gradient[rows, : step.mask.shape[1]][step.mask]
            packing, data = codec.pack(own, codec.wire_dtype(packed.dtype), packed.lengths)
            result.gradient.CopyFrom(packing)
        replies[index] = (result, data)
    return replies


def _unpack_step(header: pb.StepHeader, buffer: codec.Assembler) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``(B, L, d)``, mask ``(B, L)`` and labels ``(B, L)``, padded right."""
    x, mask = _unpack(header.embeds, buffer)
    size = sum(header.embeds.lengths) * LABEL_BYTES
    labels = torch.full(mask.shape, IGNORE)
    labels[mask] = codec.decode_labels(buffer.take(size, offset=len(buffer) - size))
    return x, mask, labels


def _widen(part: Tensor, length: int, fill: float) -> Tensor:
    """``(B, L, ...)`` padded on the right to ``(B, length, ...)``."""
    if part.shape[1] == length:
        return part
    wide = part.new_full((part.shape[0], length, *part.shape[2:]), fill)
    wide[:, : part.shape[1]] = part
    return wide


def begin_generation(llm: LocalLLM, header: pb.GenerateHeader, buffer: codec.Assembler) -> Generation:
    """The first token of each prompt.

    Raises:
        HostRefused: the numbers are not acceptable.
    """
    return Generation(llm, *_unpack(header.embeds, buffer), header.max_new_tokens)


def _unpack(packed: pb.Packed, buffer: codec.Assembler) -> tuple[Tensor, Tensor]:
    """Embeddings ``(B, L, d)``, zeros as padding, and mask ``(B, L)``."""
    dtype = codec.wire_dtype(packed.dtype)
    nbytes = sum(packed.lengths) * codec.row_bytes(dtype, packed.hidden_size)
    rows = codec.decode_rows(buffer.take(nbytes), dtype, packed.hidden_size, packed.scale)
    mask = codec.pad(packed.lengths)
    if bool(mask.all()):
        return rows.view(*mask.shape, -1), mask
    x = rows.new_zeros(*mask.shape, packed.hidden_size)
    x[mask] = rows
    return x, mask
