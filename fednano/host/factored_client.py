"""The client's half of the factored exchange: sends each sample's frozen part once, then only low-rank parts."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence

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

__all__ = ["FactoredExchange"]

_ROUNDS = 3
"""How often samples that the host let go of are sent again within one step."""


class _Frozen:
    """The frozen part of one sample, as it travels."""

    def __init__(self, rows: Tensor, labels: Tensor, streams: Tensor, dtype: torch.dtype) -> None:
        self.length = len(rows)
        self.parts = (
            bytes(codec.encode_rows(rows, dtype)),
            bytes(codec.raw(labels.int())),
            streams.cpu().contiguous().numpy().tobytes(),
        )
        self.key = sample_key(*self.parts)


class FactoredExchange:
    """Steps on kept samples over one channel.

    Args:
        channel: where to send.
        info: of the host.
        dtype: of z on the wire: float32, bfloat16 or int8.
        chunk_bytes: size of the pieces in which tensors are sent.

    Raises:
        ConfigError: another dtype.
    """

    def __init__(self, channel: HostChannel, info: HostInfo, dtype: torch.dtype, chunk_bytes: int) -> None:
        self._channel, self._info, self._dtype, self._chunk_bytes = channel, info, dtype, chunk_bytes
        self._kept_dtype = kept_dtype(dtype)
        self._sent: set[bytes] = set()
        self._lock = threading.Lock()

    def loss(self, batch: FactoredBatch, objective: str) -> Tensor:
        """Losses ``(B,)``, differentiable in the streams' z and up.

        Args:
            batch: within the host's limits.
            objective: name of the token loss.

        Raises:
            HostError: see `RemoteLLM.loss`.
        """
        ids = batch.stream_ids()
        frozen = [
            _Frozen(batch.raw[row][real], batch.labels[row][real], ids[row][real], self._kept_dtype)
            for row, real in enumerate(batch.mask)
        ]
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
            )
            body = encode_parts(z, up, self._dtype)
            nbytes = parts_bytes(counts, ranks, self._info.hidden_size, self._dtype) if want else 0
            losses, received = self._step(header, body, nbytes, frozen)
            if not want:
                return losses, [], []
            gradients = decode_parts(received, counts, ranks, self._info.hidden_size, self._dtype)
            return losses, *([part.to(device) for part in parts] for parts in gradients)  # type: ignore[return-value]

        return factored_loss(batch, compute)

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
            for chunk in codec.chunks(body, self._chunk_bytes):
                yield pb.FactoredRequest(chunk=chunk)

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
        body = [memoryview(b"".join(sample.parts[part] for sample in unique)) for part in range(3)]

        def frames() -> Iterator[pb.KeepRequest]:
            yield pb.KeepRequest(header=header)
            for chunk in codec.chunks(body, self._chunk_bytes):
                yield pb.KeepRequest(chunk=chunk)

        def attempt(exchange: Exchange) -> list[pb.KeepReply]:
            return list(exchange.stream(frames(), pb.KeepReply))

        self._channel.call("Keep", attempt)
        with self._lock:
            self._sent.update(sample.key for sample in unique)
