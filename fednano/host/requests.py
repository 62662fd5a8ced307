"""The exchanges a client has with a host, one request at a time."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from fednano.errors import HostError, HostRefused
from fednano.host import codec
from fednano.host.channel import HostChannel
from fednano.host.exchange import Exchange
from fednano.host.limits import HostInfo, HostLimits
from fednano.host.names import LABEL_BYTES, SCORES
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.images import Images
from fednano.models.language import TokenEmbedding
from fednano.models.language_inputs import IGNORE, check_token_embeds

__all__ = ["Requests", "host_info", "receive_step", "split_batch"]


def host_info(reply: pb.DescribeReply) -> HostInfo:
    """The `HostInfo` of a reply."""
    limits = reply.limits
    return HostInfo(
        fingerprint=reply.fingerprint,
        hidden_size=reply.hidden_size,
        vocab_size=reply.vocab_size,
        max_positions=reply.max_positions,
        dtype=reply.dtype,
        eos_token_ids=tuple(reply.eos_token_ids),
        pad_token_id=reply.pad_token_id,
        objectives=tuple(reply.objectives),
        limits=HostLimits(
            max_batch=limits.max_batch,
            max_tokens=limits.max_tokens,
            max_new_tokens=limits.max_new_tokens,
            max_request_bytes=limits.max_request_bytes,
        ),
        version=reply.version,
        images=reply.images or "plain",
        lossless=reply.lossless,
    )


def split_batch(lengths: Sequence[int], info: HostInfo, dtype: torch.dtype) -> list[slice]:
    """Cut a batch into runs of samples that each fit the host's limits, as long as possible.

    Args:
        lengths: tokens of each sample.
        info: holds the limits.
        dtype: type on the wire.

    Raises:
        HostRefused: one sample alone is beyond the limits.
    """
    per_token = codec.row_bytes(dtype, info.hidden_size) + LABEL_BYTES
    limits, parts, start = info.limits, [], 0
    for i, length in enumerate(lengths):
        if length > limits.max_tokens or length * per_token > limits.max_request_bytes:
            raise HostRefused(
                f"sample {i} has {length} tokens of {per_token} bytes; the host takes at most {limits.max_tokens} "
                f"tokens and {limits.max_request_bytes} bytes at a time: shorten it, or raise the host's limits"
            )
        run = lengths[start : i + 1]
        area, nbytes = len(run) * max(run), sum(run) * per_token
        if len(run) > limits.max_batch or area > limits.max_tokens or nbytes > limits.max_request_bytes:
            parts.append(slice(start, i))
            start = i
    return [*parts, slice(start, len(lengths))]


def receive_step(replies: Iterator[pb.StepReply], nbytes: int) -> tuple[pb.StepResult, codec.Assembler]:
    """Header and tensor bytes of the replies to a step.

    Raises:
        HostRefused: more bytes than ``nbytes`` came.
    """
    result, buffer = pb.StepResult(), codec.Assembler(nbytes, "reply to step")
    for reply in replies:
        if reply.WhichOneof("frame") == "header":
            result = reply.header
        else:
            buffer.add_frame(reply)
    return result, buffer


class Requests:
    """Steps and answers over one channel.

    Args:
        channel: where to send.
        info: of the host.
        chunking: how tensors are sent, and may come back.
    """

    def __init__(self, channel: HostChannel, info: HostInfo, chunking: codec.Chunking) -> None:
        self._channel, self._info, self._chunking = channel, info, chunking

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
        """One training step.

        Args:
            rows: ``(N, d)`` embeddings, samples end to end.
            lengths: tokens of each of the B samples.
            labels: ``(N,)`` int64.
            objective: name of the token loss.
            dtype: type on the wire.
            want_gradient: whether the gradient is to be computed.
            images: of each sample.

        Returns:
            Losses ``(B,)`` float32, and the gradient of their sum ``(N, d)`` or ``None``.
        """
        packed, data = codec.pack(rows, dtype, lengths)
        codec.put_images(packed, images)
        header = pb.StepHeader(
            request_id=uuid.uuid4().hex,
            fingerprint=self._info.fingerprint,
            objective=objective,
            embeds=packed,
            want_gradient=want_gradient,
            lossless=self._chunking.lossless,
        )
        body = [data, codec.raw(labels.int())]
        nbytes = len(rows) * codec.row_bytes(dtype, rows.shape[1]) if want_gradient else 0

        def frames() -> Iterator[pb.StepRequest]:
            yield pb.StepRequest(header=header)
            yield from self._chunking.messages(pb.StepRequest, body)

        def attempt(exchange: Exchange) -> tuple[pb.StepResult, codec.Assembler]:
            return receive_step(exchange.stream(frames(), pb.StepReply), nbytes)

        result, buffer = self._channel.call("Step", attempt, samples=len(lengths))
        received = buffer.take(nbytes)
        if len(result.losses) != len(lengths):
            raise HostError(f"reply to step: got {len(result.losses)} losses, expected {len(lengths)}")
        losses = torch.tensor(result.losses, dtype=torch.float32)
        if not want_gradient:
            return losses, None
        return losses, codec.decode_rows(received, dtype, rows.shape[1], result.gradient.scale)

    def score(
        self,
        rows: Tensor,
        lengths: Sequence[int],
        labels: Tensor,
        *,
        dtype: torch.dtype,
        images: Images = (),
    ) -> Tensor:
        """What the model says of each labelled token.

        Args:
            rows: ``(N, d)`` embeddings, samples end to end.
            lengths: tokens of each of the B samples.
            labels: ``(N,)`` int64; that of a sample's first token counts for nothing.
            dtype: type on the wire.
            images: of each sample.

        Returns:
            ``(n, 5)`` float64, see `fednano.models.language.LanguageModel.score`.
        """
        packed, data = codec.pack(rows, dtype, lengths)
        codec.put_images(packed, images)
        header = pb.StepHeader(request_id=uuid.uuid4().hex, fingerprint=self._info.fingerprint, embeds=packed)
        body = [data, codec.raw(labels.int())]
        asked = sum(int((part[1:] != IGNORE).sum()) for part in torch.split(labels, list(lengths)))
        nbytes = asked * SCORES * 8

        def frames() -> Iterator[pb.StepRequest]:
            yield pb.StepRequest(header=header)
            yield from self._chunking.messages(pb.StepRequest, body)

        def attempt(exchange: Exchange) -> codec.Assembler:
            return receive_step(exchange.stream(frames(), pb.StepReply), nbytes)[1]

        buffer = self._channel.call("Score", attempt, samples=len(lengths))
        return codec.decode_doubles(buffer.take(nbytes)).view(asked, SCORES)

    def generate(
        self,
        rows: Tensor,
        lengths: Sequence[int],
        max_new_tokens: int,
        *,
        dtype: torch.dtype,
        embed: TokenEmbedding | None,
        images: Images = (),
    ) -> Tensor:
        """Answers to one batch of prompts.

        Args:
            rows: ``(N, d)`` embedded prompts, end to end.
            lengths: tokens of each of the B prompts.
            max_new_tokens: at least 1.
            dtype: type on the wire.
            embed: adapted embedding of new tokens, or ``None``.
            images: of each prompt.

        Returns:
            ``(B, max_new_tokens)`` int64.
        """
        packed, data = codec.pack(rows, dtype, lengths)
        codec.put_images(packed, images)
        header = pb.GenerateHeader(
            request_id=uuid.uuid4().hex,
            fingerprint=self._info.fingerprint,
            embeds=packed,
            max_new_tokens=max_new_tokens,
            client_embeds=embed is not None,
        )
        eos = torch.tensor(self._info.eos_token_ids, dtype=torch.int64)

        def attempt(exchange: Exchange) -> Tensor:
            outbox: SimpleQueue[pb.GenerateRequest | None] = SimpleQueue()

            def frames() -> Iterator[pb.GenerateRequest]:
                yield pb.GenerateRequest(header=header)
                yield from self._chunking.messages(pb.GenerateRequest, [data])
                # gRPC runs this on a thread of its own; None ends it.
                while (frame := outbox.get()) is not None:
                    yield frame

            tokens = torch.full((len(lengths), max_new_tokens), self._info.pad_token_id)
            ended = torch.zeros(len(lengths), dtype=torch.bool)
            if embed is None:
                outbox.put(None)
            try:
                for step, reply in enumerate(exchange.stream(frames(), pb.GenerateReply)):
                    if len(reply.tokens) != len(lengths) or step == max_new_tokens:
                        raise HostError(f"reply to generate: got {len(reply.tokens)} tokens at step {step}")
                    tokens[:, step] = last = torch.tensor(reply.tokens, dtype=torch.int64)
                    ended |= torch.isin(last, eos)
                    if embed is not None and step + 1 < max_new_tokens and not bool(ended.all()):
                        new = embed(last)
                        check_token_embeds(new, len(lengths), rows.shape[1])
                        own = [codec.encode_rows(new, dtype)]
                        for frame in self._chunking.messages(pb.GenerateRequest, own):
                            outbox.put(frame)
            finally:
                outbox.put(None)
            return tokens

        return self._channel.call("Generate", attempt, samples=len(lengths))
