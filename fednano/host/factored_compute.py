"""What a worker thread does with a factored step: kept rows plus low-rank parts, the model, low-rank gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fednano.errors import HostRefused
from fednano.host import codec
from fednano.host.factored_codec import decode_parts, encode_parts, sample_key
from fednano.host.jobs import Job, Reply
from fednano.host.kept import KeptSample
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.images import ImageSpan
from fednano.models.language import LocalLLM
from fednano.models.language_inputs import IGNORE

__all__ = ["factored_job", "stream_counts", "unpack_kept"]


def unpack_kept(header: pb.KeepHeader, buffer: codec.Assembler) -> tuple[list[bytes], list[KeptSample]]:
    """The samples of a keep request, with the names that their bytes have.

    Raises:
        HostRefused: a number is not finite.
    """
    packed = header.embeds
    dtype, width, total = codec.wire_dtype(packed.dtype), packed.hidden_size, sum(packed.lengths)
    row = codec.row_bytes(dtype, width)
    data = buffer.take(len(buffer))
    rows, labels, streams = (
        data[: total * row],
        data[total * row : total * (row + 4)],
        data[total * (row + 4) :],
    )
    images = codec.images_of(packed) or [()] * len(packed.lengths)
    keys, samples, at = [], [], 0
    for index, length in enumerate(packed.lengths):
        parts = (
            rows[at * row : (at + length) * row],
            labels[4 * at : 4 * (at + length)],
            streams[at : at + length],
        )
        keys.append(sample_key(parts[0].tobytes(), parts[1].tobytes(), parts[2].tobytes(), images[index]))
        tensor = codec.decode_rows(parts[0].copy(), dtype, width)
        if not bool(tensor.isfinite().all()):
            raise HostRefused(f"embeds: sample {index} holds NaN or infinity; expected finite numbers")
        samples.append(
            KeptSample(
                tensor,
                codec.decode_labels(parts[1].copy()).int(),
                torch.from_numpy(parts[2].copy()),
                torch.tensor(images[index], dtype=torch.int32).view(-1, 3),
            )
        )
        at += length
    return keys, samples


def stream_counts(samples: Sequence[KeptSample], streams: int) -> list[int]:
    """Positions of each of ``streams`` streams in a batch."""
    return [sum(int((sample.streams == index + 1).sum()) for sample in samples) for index in range(streams)]


def factored_job(
    llm: LocalLLM,
    header: pb.FactoredHeader,
    samples: Sequence[KeptSample],
    buffer: codec.Assembler,
    rows_of: Callable[[bytes, KeptSample, Callable[[Tensor], Tensor]], Tensor],
) -> Job:
    """The job of a step on kept samples: each stream's rows are the kept ones plus ``z up``.

    Args:
        llm: the model.
        header: of the request; its sizes have been checked.
        samples: the kept samples that it names.
        buffer: z and up of each stream.
        rows_of: brings a sample's rows to the device, or has them there: `KeptSamples.rows` of one room.

    Raises:
        HostRefused: the numbers are not acceptable.
        ConfigError: unknown objective.
    """
    ranks, width, device = list(header.ranks), llm.hidden_size, llm.device
    dtype = codec.wire_dtype(header.dtype)
    counts = stream_counts(samples, len(ranks))
    z, up = decode_parts(buffer.take(len(buffer)), counts, ranks, width, dtype)
    z, up = [part.to(device) for part in z], [part.to(device) for part in up]

    def move(rows: Tensor) -> Tensor:
        return rows.to(device)

    kept = [rows_of(key, sample, move) for key, sample in zip(header.keys, samples, strict=True)]
    for rows in kept:
        if rows.is_cuda:  # another thread may let go of them while this one's stream still reads
            rows.record_stream(torch.cuda.current_stream(device))
    x = pad_sequence([rows.float() for rows in kept], batch_first=True)  # (B, L, d)
    streams = pad_sequence([sample.streams for sample in samples], batch_first=True)  # (B, L)
    labels = pad_sequence(
        [sample.labels.long() for sample in samples], batch_first=True, padding_value=IGNORE
    )
    mask = codec.pad([len(sample.rows) for sample in samples])
    places = [(streams == index + 1).flatten().nonzero().flatten().to(device) for index in range(len(ranks))]
    for place, z_part, up_part in zip(places, z, up, strict=True):
        x.view(-1, width).index_add_(0, place, z_part @ up_part)
    images = [[ImageSpan(*span) for span in sample.images.tolist()] for sample in samples]
    llm.check(x, mask, labels, header.objective, images)

    def finish(losses: Tensor, gradient: Tensor | None) -> Reply:
        result = pb.StepResult(losses=losses.tolist())
        if gradient is None:
            return result, []
        if header.weights:
            gradient = gradient * torch.tensor(list(header.weights), device=device)[:, None, None]
        z_gradients: list[Tensor] = []
        up_gradients: list[Tensor] = []
        for place, z_part, up_part in zip(places, z, up, strict=True):
            rows = gradient.reshape(-1, width).index_select(0, place).float()  # (N_i, d)
            z_gradients.append(rows @ up_part.T)
            up_gradients.append(z_part.T @ rows)
        return result, encode_parts(z_gradients, up_gradients, dtype)

    return Job(x, mask, labels, header.objective, header.want_gradient, finish, images)
