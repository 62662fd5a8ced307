"""The client's half of a step whose labels stay here: its own head, its own loss."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from itertools import accumulate
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from fednano.errors import HostError
from fednano.host import codec
from fednano.host.channel import HostChannel
from fednano.host.exchange import Exchange
from fednano.host.limits import HostInfo
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.requests import Requests
from fednano.models.images import Images
from fednano.models.language_inputs import IGNORE
from fednano.models.passes import sample_losses

__all__ = ["PrivateRequests"]


class PrivateRequests(Requests):
    """`Requests` whose steps keep labels and logits on this side.

    Args:
        channel: where to send.
        info: of the host.
        chunking: how tensors are sent, and may come back.
        head: maps hidden states ``(..., d)`` to logits; that of the host's model.
    """

    def __init__(
        self, channel: HostChannel, info: HostInfo, chunking: codec.Chunking, head: nn.Module
    ) -> None:
        super().__init__(channel, info, chunking)
        self._head = head

    def step(
        self,
        rows: Tensor,
        lengths: Sequence[int],
        labels: Tensor,
        objective: str,
        *,
        dtype: torch.dtype,
        want_gradient: bool,
        images: Images = (),
    ) -> tuple[Tensor, Tensor | None]:
        """See `Requests.step`."""
        packed, data = codec.pack(rows, dtype, lengths)
        codec.put_images(packed, images)
        starts = [0, *accumulate(lengths)][:-1]
        keep = labels != IGNORE
        keep[starts] = False  # nothing predicts a sample's first token
        counts = [int(part.sum()) for part in torch.split(keep, list(lengths))]
        header = pb.PrivateHeader(
            request_id=uuid.uuid4().hex,
            fingerprint=self._info.fingerprint,
            embeds=packed,
            labelled=keep.nonzero().flatten().tolist(),
            want_gradient=want_gradient,
            lossless=self._chunking.lossless,
        )
        width = rows.shape[1]
        sizes = [n * codec.row_bytes(dtype, width) for n in (sum(counts), len(rows))]

        def attempt(exchange: Exchange) -> tuple[Tensor, Tensor | None]:
            outbox: SimpleQueue[pb.PrivateRequest | None] = SimpleQueue()

            def frames() -> Iterator[pb.PrivateRequest]:
                yield pb.PrivateRequest(header=header)
                yield from self._chunking.messages(pb.PrivateRequest, [data])
                # gRPC runs this on a thread of its own; None ends it.
                while (frame := outbox.get()) is not None:
                    yield frame

            try:
                replies = exchange.stream(frames(), pb.PrivateReply)
                hidden = _receive(replies, "hidden", sizes[0], dtype, width)
                losses, gradient = self._loss(hidden, labels[keep], counts, objective, want_gradient)
                if gradient is None:
                    return losses, None
                back, body = codec.pack(gradient, dtype, counts)
                outbox.put(pb.PrivateRequest(gradient=back))
                for frame in self._chunking.messages(pb.PrivateRequest, [body]):
                    outbox.put(frame)
                return losses, _receive(replies, "gradient", sizes[1], dtype, width)
            finally:
                outbox.put(None)

        return self._channel.call("PrivateStep", attempt, samples=len(lengths))

    def _loss(
        self, hidden: Tensor, labels: Tensor, counts: list[int], objective: str, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses ``(B,)`` and the gradient ``(K, d)`` of their sum, on the CPU."""
        weight = next(self._head.parameters())
        leaf = hidden.to(weight.device, weight.dtype).requires_grad_(want_gradient)
        with torch.set_grad_enabled(want_gradient):
            losses = sample_losses(self._head, leaf, labels.to(weight.device), counts, objective)
            gradient = torch.autograd.grad(losses.sum(), leaf)[0].cpu() if want_gradient else None
        return losses.detach().cpu(), gradient


def _receive(
    replies: Iterator[pb.PrivateReply], what: str, nbytes: int, dtype: torch.dtype, width: int
) -> Tensor:
    """Rows ``(n, width)`` that come as a header and chunks.

    Raises:
        HostError: something else came.
        HostRefused: more or fewer bytes than expected.
    """
    first = next(replies, None)
    if first is None or first.WhichOneof("frame") != what:
        raise HostError(f"reply to private step: expected the header of {what}")
    packed: pb.Packed = getattr(first, what)
    buffer = codec.Assembler(nbytes, f"reply to private step, {what}")
    while not buffer.complete and (reply := next(replies, None)) is not None:
        buffer.add_frame(reply)
    return codec.decode_rows(buffer.take(nbytes), dtype, width, packed.scale)
