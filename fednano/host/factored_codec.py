"""The factored exchange on the wire: names of samples, and the layout of low-rank parts.

Both sides compute sizes from the same few numbers, so a stream that is cut short or runs over is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fednano.errors import ConfigError
from fednano.host import codec
from fednano.models.images import ImageSpan

__all__ = ["KEY_BYTES", "decode_parts", "encode_parts", "kept_dtype", "parts_bytes", "sample_key", "up_dtype"]

KEY_BYTES = 16


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which type a sample's frozen part travels, once, for steps of a wire type.

    Raises:
        ConfigError: the exchange has no such type.
    """
    if dtype == torch.float16:
        raise ConfigError(
            "the factored exchange does not travel as float16; expected float32, bfloat16 or int8"
        )
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def up_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which type up-projections and their gradients travel: small beside z, and not to be rounded to bytes."""
    return kept_dtype(dtype)


def sample_key(rows: bytes, labels: bytes, streams: bytes, spans: Sequence[ImageSpan] = ()) -> bytes:
    """The name of a frozen part: `KEY_BYTES` of the SHA-256 of its bytes as they travel, each with its length,
    and of where its images stand."""
    digest = hashlib.sha256()
    where = b"".join(number.to_bytes(4, "little") for span in spans for number in span)
    for part in (rows, labels, streams, where):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()[:KEY_BYTES]


def parts_bytes(counts: Sequence[int], ranks: Sequence[int], width: int, dtype: torch.dtype) -> int:
    """Bytes of the low-rank parts, or of their gradients.

    Args:
        counts: positions of each stream in the batch.
        ranks: rank of each stream.
        width: d.
        dtype: of z on the wire.
    """
    z = sum(count * codec.row_bytes(dtype, rank) for count, rank in zip(counts, ranks, strict=True))
    return z + sum(rank * width for rank in ranks) * up_dtype(dtype).itemsize


def encode_parts(z: Sequence[Tensor], up: Sequence[Tensor], dtype: torch.dtype) -> list[memoryview]:
    """Bytes of each z ``(N_i, r_i)``, then of each up ``(r_i, d)``."""
    return [codec.encode_rows(part, dtype) for part in z if part.numel()] + [
        codec.encode_rows(part, up_dtype(dtype)) for part in up
    ]


def decode_parts(
    buffer: codec.Bytes, counts: Sequence[int], ranks: Sequence[int], width: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Inverse of `encode_parts`; float32."""
    at = 0

    def take(rows: int, columns: int, kind: torch.dtype) -> Tensor:
        nonlocal at
        size = rows * codec.row_bytes(kind, columns)
        part = codec.decode_rows(buffer[at : at + size].copy(), kind, columns).float()
        at += size
        return part

    z = [take(count, rank, dtype) for count, rank in zip(counts, ranks, strict=True)]
    return z, [take(rank, width, up_dtype(dtype)) for rank in ranks]
