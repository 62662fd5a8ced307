"""What a worker thread does with a received request: bytes to tensors, the model, tensors to bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from fednano.host import codec
from fednano.host.names import LABEL_BYTES
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.language import Generation, LocalLLM
from fednano.models.language_inputs import IGNORE

__all__ = ["begin_generation", "compute_step"]


def compute_step(
    llm: LocalLLM, header: pb.StepHeader, buffer: codec.Assembler
) -> tuple[pb.StepResult, memoryview]:
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
    x, mask = _unpack(header.embeds, buffer)
    size = sum(header.embeds.lengths) * LABEL_BYTES
    labels = torch.full(mask.shape, IGNORE)
    labels[mask] = codec.decode_labels(buffer.take(size, offset=len(buffer) - size))
    with torch.set_grad_enabled(header.want_gradient):
        losses = llm.loss(x.requires_grad_(header.want_gradient), mask, labels, header.objective)
    result, data = pb.StepResult(losses=losses.tolist()), memoryview(b"")
    if header.want_gradient:
        (gradient,) = torch.autograd.grad(losses.sum(), x)
        packed, data = codec.pack(
            gradient[mask], codec.wire_dtype(header.embeds.dtype), header.embeds.lengths
        )
        result.gradient.CopyFrom(packed)
    return result, data


def begin_generation(llm: LocalLLM, header: pb.GenerateHeader, buffer: codec.Assembler) -> Generation:
    """The first token of each prompt.

    Raises:
        HostRefused: the numbers are not acceptable.
    """
    return Generation(llm, *_unpack(header.embeds, buffer), header.max_new_tokens)


def _unpack(packed: pb.Packed, buffer: codec.Assembler) -> tuple[Tensor, Tensor]:
    """Embeddings ``(B, L, d)``, zeros as padding, and mask ``(B, L)``."""
    dtype = codec.wire_dtype(packed.dtype)
    nbytes = sum(packed.lengths) * packed.hidden_size * dtype.itemsize
    rows = codec.decode(buffer.take(nbytes), dtype, packed.scale).view(-1, packed.hidden_size)
    mask = codec.pad(packed.lengths)
    if bool(mask.all()):
        return rows.view(*mask.shape, -1), mask
    x = rows.new_zeros(*mask.shape, packed.hidden_size)
    x[mask] = rows
    return x, mask
