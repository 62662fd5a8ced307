"""The client's half of the factored exchange: sends each sample's frozen part once, then only low-rank parts."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fednano.errors import HostError, HostRefused
from fednano.host import codec
from fednano.host.channel import HostChannel, SamplesMissing
from fednano.host.exchange import Exchange
from fednano.host.factored_codec import decode_parts, encode_parts, kept_dtype, parts_bytes, sample_key
from fednano.host.limits import HostInfo
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.requests import receive_step
from fednano.models.factored import FactoredBatch, factored_loss
from fednano.models.images import ImageSpan

__all__ = ["FactoredExchange"]

_KEYS = 65_536
"""Keys remembered; some megabytes."""
_ROUNDS = 3
"""How often samples that the host let go of are sent again within one step."""


class _Frozen:
    """The frozen part of one sample; encoded and hashed when first asked for.

    Args:
        rows: ``(n, d)``.
        labels: ``(n,)``.
        streams: ``(n,)`` uint8.
        spans: where its images stand.
        dtype: of rows on the wire.
    """

    def __init__(
        self, rows: Tensor, labels: Tensor, streams: Tensor, spans: Sequence[ImageSpan], dtype: torch.dtype
    ) -> None:
        self.length, self.spans = len(rows), spans
        self._given = rows, labels, streams, dtype

    @cached_property
    def parts(self) -> tuple[bytes, bytes, bytes]:
        """As they travel."""
        rows, labels, streams, dtype = self._given
        return (
            bytes(codec.encode_rows(rows, dtype)),
            bytes(codec.raw(labels.int())),
            streams.cpu().contiguous().numpy().tobytes(),
        )

    @cached_property
    def key(self) -> bytes:
        """The name under which it is kept; see `FactoredExchange._frozen` for where it is known without encoding."""
        return sample_key(*self.parts, self.spans)


class FactoredExchange:
    """Steps on kept samples over one channel.

    Args:
        channel: where to send.
        info: of the host.
        dtype: of z on the wire: float32, bfloat16 or int8.
        chunking: how tensors are sent, and may come back.

    Raises:
        ConfigError: another dtype.
    """

    def __init__(
        self, channel: HostChannel, info: HostInfo, dtype: torch.dtype, chunking: codec.Chunking
    ) -> None:
        self._channel, self._info, self._dtype, self._chunking = channel, info, dtype, chunking
        self._kept_dtype = kept_dtype(dtype)
        self._sent: set[bytes] = set()
        self._keys: dict[Hashable, bytes] = {}
        self._lock = threading.Lock()

    def loss(self, batch: FactoredBatch, objective: str) -> Tensor:
        """Losses ``(B,)``, differentiable in the streams' z and up.

        Args:
            batch: within the host's limits.
            objective: name of the token loss.

        Raises:
            HostError: see `RemoteLLM.loss`.
        """
        frozen = self._frozen(batch)
        counts = [int(stream.where.sum()) for stream in batch.streams]
        ranks = [stream.z.shape[1] for stream in batch.streams]
        device = batch.raw.device

        def compute(
            z: list[Tensor], up: list[Tensor], weights: Tensor | None, want: bool
        ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            header = pb.FactoredHeader(
                request_id=uuid.uuid4().hex,
                fingerprint=self._info.fingerprint,
                objective=objective,
                keys=[sample.key for sample in frozen],
                dtype=codec.wire_code(self._dtype),
                ranks=ranks,
                want_gradient=want,
                weights=[] if weights is None else weights.tolist(),
                lossless=self._chunking.lossless,
            )
            body = encode_parts(z, up, self._dtype)
            nbytes = parts_bytes(counts, ranks, self._info.hidden_size, self._dtype) if want else 0
            losses, received = self._step(header, body, nbytes, frozen)
            if not want:
                return losses, [], []
            gradients = decode_parts(received, counts, ranks, self._info.hidden_size, self._dtype)
            return losses, *([part.to(device) for part in parts] for parts in gradients)  # type: ignore[return-value]

        return factored_loss(batch, compute)

    def _frozen(self, batch: FactoredBatch) -> list[_Frozen]:
        """The frozen parts of a batch. The key of a sample that came before is taken from then: encoding and hashing
        every sample anew would cost each step as much as the full exchange spends on its bytes."""
        ids = batch.stream_ids().cpu()
        mask, labels = batch.mask.cpu(), batch.labels.cpu()
        images = batch.images or [()] * len(mask)
        found = []
        for row, real in enumerate(mask):
            streams = ids[row][real]
            own = _Frozen(
                batch.raw[row][real.to(batch.raw.device)],
                labels[row][real],
                streams,
                images[row],
                self._kept_dtype,
            )
            if row < len(batch.names):
                name = (batch.names[row], batch.raw.dtype, streams.numpy().tobytes())
                with self._lock:
                    known = self._keys.get(name)
                if known is not None:
                    own.key = known
                else:
                    with self._lock:
                        if len(self._keys) >= _KEYS:
                            self._keys.clear()
                        self._keys[name] = own.key
            found.append(own)
        return found

    def _step(
        self,
        header: pb.FactoredHeader,
        body: Sequence[memoryview],
        nbytes: int,
        frozen: Sequence[_Frozen],
    ) -> tuple[Tensor, codec.Bytes]:
        with self._lock:
            new = [sample for sample in frozen if sample.key not in self._sent]
        self._keep(new)

        def frames() -> Iterator[pb.FactoredRequest]:
            yield pb.FactoredRequest(header=header)
            yield from self._chunking.messages(pb.FactoredRequest, body)

        def attempt(exchange: Exchange) -> tuple[pb.StepResult, codec.Assembler]:
            return receive_step(exchange.stream(frames(), pb.StepReply), nbytes)

        for _ in range(_ROUNDS):
            try:
                result, buffer = self._channel.call("FactoredStep", attempt, samples=len(frozen))
            except SamplesMissing as missing:
                self._keep([frozen[index] for index in missing.indexes if 0 <= index < len(frozen)])
                continue
            if len(result.losses) != len(frozen):
                raise HostError(
                    f"reply to factored step: got {len(result.losses)} losses, expected {len(frozen)}"
                )
            return torch.tensor(result.losses, dtype=torch.float32), buffer.take(nbytes)
        raise HostRefused(
            f"the language host let go of samples of a step {_ROUNDS} times before it was computed: it keeps too few "
            "for its clients. Raise its --keep-bytes, or use the full exchange"
        )

    def _keep(self, samples: Sequence[_Frozen]) -> None:
        """Send frozen parts; equal ones once."""
        unique = list({sample.key: sample for sample in samples}.values())
        if not unique:
            return
        header = pb.KeepHeader(
            request_id=uuid.uuid4().hex,
            fingerprint=self._info.fingerprint,
            embeds=pb.Packed(
                dtype=codec.wire_code(self._kept_dtype),
                hidden_size=self._info.hidden_size,
                lengths=[sample.length for sample in unique],
                scale=1.0,
            ),
            keys=[sample.key for sample in unique],
        )
        codec.put_images(header.embeds, [sample.spans for sample in unique])
        body = [memoryview(b"".join(sample.parts[part] for sample in unique)) for part in range(3)]

        def frames() -> Iterator[pb.KeepRequest]:
            yield pb.KeepRequest(header=header)
            yield from self._chunking.messages(pb.KeepRequest, body)

        def attempt(exchange: Exchange) -> list[pb.KeepReply]:
            return list(exchange.stream(frames(), pb.KeepReply))

        self._channel.call("Keep", attempt)
        with self._lock:
            self._sent.update(sample.key for sample in unique)
