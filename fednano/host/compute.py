"""A received request as tensors on the model's device, and its reply as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from fednano.host import codec
from fednano.host.jobs import Job, Reply
from fednano.host.names import LABEL_BYTES
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.language import Generation, LocalLLM
from fednano.models.language_inputs import IGNORE

__all__ = ["begin_generation", "compute_scores", "step_job", "unpack"]


def step_job(llm: LocalLLM, header: pb.StepHeader, buffer: codec.Assembler) -> Job:
    """The job of a training step.

    Args:
        llm: the model.
        header: of the request; its sizes have been checked.
        buffer: embeddings and labels.

    Raises:
        HostRefused: the numbers are not acceptable (non-finite, ids out of range).
        ConfigError: unknown objective.
    """
    packed = header.embeds
    x, mask, labels = _unpack_step(llm, packed, buffer)
    images = codec.images_of(packed)
    llm.check(x, mask, labels, header.objective, images)

    def finish(losses: Tensor, gradient: Tensor | None) -> Reply:
        result = pb.StepResult(losses=losses.tolist())
        if gradient is None:
            return result, []
        real = gradient.flatten(0, 1)
        if not bool(mask.all()):
            real = real.index_select(0, mask.flatten().nonzero().flatten().to(gradient.device))
        packing, data = codec.pack(real, codec.wire_dtype(packed.dtype), packed.lengths)
        result.gradient.CopyFrom(packing)
        return result, [data]

    return Job(x, mask, labels, header.objective, header.want_gradient, finish, images)


def compute_scores(llm: LocalLLM, header: pb.StepHeader, buffer: codec.Assembler) -> memoryview:
    """Bytes of what the model says of each labelled token, see `fednano.models.language.LanguageModel.score`.

    Raises:
        HostRefused: the numbers are not acceptable.
    """
    return codec.raw_doubles(
        torch.cat(llm.score(*_unpack_step(llm, header.embeds, buffer), codec.images_of(header.embeds)))
    )


def _unpack_step(llm: LocalLLM, packed: pb.Packed, buffer: codec.Assembler) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings ``(B, L, d)``, mask ``(B, L)`` and labels ``(B, L)``, padded right."""
    x, mask = unpack(packed, buffer, llm.device)
    size = sum(packed.lengths) * LABEL_BYTES
    labels = torch.full(mask.shape, IGNORE)
    labels[mask] = codec.decode_labels(buffer.take(size, offset=len(buffer) - size))
    return x, mask, labels


def begin_generation(llm: LocalLLM, header: pb.GenerateHeader, buffer: codec.Assembler) -> Generation:
    """The first token of each prompt.

    Raises:
        HostRefused: the numbers are not acceptable.
    """
    x, mask = unpack(header.embeds, buffer, llm.device)
    return Generation(llm, x, mask, header.max_new_tokens, codec.images_of(header.embeds))


def unpack(packed: pb.Packed, buffer: codec.Assembler, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings ``(B, L, d)`` on ``device``, zeros as padding, and mask ``(B, L)`` on the CPU."""
    dtype = codec.wire_dtype(packed.dtype)
    nbytes = sum(packed.lengths) * codec.row_bytes(dtype, packed.hidden_size)
    away = None if device.type == "cpu" else device
    rows = codec.decode_rows(buffer.take(nbytes), dtype, packed.hidden_size, packed.scale, away)
    mask = codec.pad(packed.lengths)
    if bool(mask.all()):
        return rows.view(*mask.shape, -1), mask
    x = rows.new_zeros(mask.numel(), packed.hidden_size)
    x.index_copy_(0, mask.flatten().nonzero().flatten().to(device), rows)
    return x.view(*mask.shape, -1), mask
