"""Tensors to bytes and back: raw little-endian numbers, padding left out, cut into chunks.

A batch ``(B, T, d)`` with a mask travels as its N real tokens laid end to end, ``(N, d)``, and the number of
tokens of each sample. A float16 batch is first multiplied by a power of two, so that small gradients do not
vanish and large activations do not overflow; such a factor changes no digit. An int8 batch travels row by row, each
token with a scale of its own (4 bytes, then d bytes): the largest number of a token decides its step, not that of the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fednano.errors import HostRefused
from fednano.host.planes import Bytes, expand, squeeze
from fednano.host.proto import language_host_pb2 as pb
from fednano.models.images import Images, ImageSpan, check_images

__all__ = [
    "Assembler",
    "Bytes",
    "Chunking",
    "decode",
    "decode_doubles",
    "decode_labels",
    "decode_rows",
    "encode",
    "encode_rows",
    "images_of",
    "pack",
    "pad",
    "put_images",
    "raw",
    "raw_doubles",
    "row_bytes",
    "views",
    "wire_code",
    "wire_dtype",
]

M = TypeVar("M")
_DTYPES = {
    pb.FLOAT32: torch.float32,
    pb.BFLOAT16: torch.bfloat16,
    pb.FLOAT16: torch.float16,
    pb.INT8: torch.int8,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_NUMBERS = {2: (torch.int16, "<i2"), 4: (torch.int32, "<i4")}
_HALF_TOP = 2.0**14
"""Largest magnitude after scaling to float16, whose maximum is 65504: a reserve of two doublings."""
_SCALE_BYTES = 4


def wire_dtype(code: pb.DType) -> torch.dtype:
    """The torch dtype of a wire code.

    Raises:
        HostRefused: unknown code.
    """
    if code not in _DTYPES:
        raise HostRefused(f"dtype: got wire code {code}, expected FLOAT32, BFLOAT16, FLOAT16 or INT8")
    return _DTYPES[code]


def wire_code(dtype: torch.dtype) -> pb.DType:
    """The wire code of a torch dtype."""
    return _CODES[dtype]


def row_bytes(dtype: torch.dtype, width: int) -> int:
    """Bytes on the wire of one token of ``width`` numbers."""
    return _SCALE_BYTES + width if dtype == torch.int8 else width * dtype.itemsize


def pad(lengths: Sequence[int]) -> Tensor:
    """Mask ``(B, L)`` of samples that start at column 0, with L the longest of ``lengths``."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    return torch.arange(int(sizes.max())) < sizes.unsqueeze(1)


def encode(rows: Tensor, dtype: torch.dtype) -> tuple[memoryview, float]:
    """Raw bytes of ``rows`` in ``dtype``, and the power of two they were multiplied by.

    Args:
        rows: any shape, any float type, any device.
        dtype: float32, bfloat16 or float16.
    """
    scale = 1.0
    if dtype == torch.float16:
        top = float(rows.abs().max()) if rows.numel() else 0.0
        if 0 < top < math.inf:
            # frexp: top = m 2^e with m below 1, so top * scale < _HALF_TOP. The bounds keep `scale` a float32.
            exponent = min(max(int(math.log2(_HALF_TOP)) - math.frexp(top)[1], -120), 120)
            scale = 2.0**exponent
            rows = rows.float() * scale
    return raw(rows.to(dtype)), scale


def raw(tensor: Tensor) -> memoryview:
    """Little-endian bytes of a tensor of 2- or 4-byte numbers."""
    like, order = _NUMBERS[tensor.element_size()]
    numbers = _on_cpu(tensor.detach().contiguous().view(-1).view(like)).numpy()
    return numbers.astype(order, copy=False).view(np.uint8).data


def raw_doubles(tensor: Tensor) -> memoryview:
    """Little-endian bytes of a float64 tensor."""
    return tensor.numpy().astype("<f8", copy=False).reshape(-1).view(np.uint8).data


def decode_doubles(buffer: Bytes) -> Tensor:
    """Float64 numbers ``(n,)`` from their little-endian bytes ``(8 n,)``."""
    return torch.from_numpy(buffer.view("<f8").astype("=f8"))


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, through locked pages from a GPU: other copies and computations go on meanwhile."""
    if not tensor.is_cuda:
        return tensor
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    target.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return target


def decode(
    buffer: Bytes, dtype: torch.dtype, scale: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Numbers ``(n,)`` from their little-endian bytes ``(n * itemsize,)``; float16 comes back as float32.

    The result may share memory with ``buffer``. For another ``device`` the bytes are sent there as they are.
    """
    like, order = _NUMBERS[dtype.itemsize]
    numbers = (
        torch.from_numpy(buffer.view(order).astype(order.replace("<", "="), copy=False))
        .view(like)
        .view(dtype)
    )
    if device is not None:
        numbers = numbers.to(device, non_blocking=True)
    return numbers if dtype != torch.float16 else numbers.float() / scale


def encode_rows(rows: Tensor, dtype: torch.dtype) -> memoryview:
    """Bytes of tokens ``(N, d)`` in ``dtype``, without a common factor."""
    if dtype != torch.int8:
        return raw(rows.to(dtype))
    numbers = rows.detach().float()
    step = numbers.abs().amax(1, keepdim=True) / 127  # (N, 1)
    # A row that is not finite gets a step that is not, and comes out as NaN: nobody takes it for numbers.
    bytes_ = torch.where(step > 0, numbers / step, 0).nan_to_num().round().clamp(-127, 127).to(torch.int8)
    whole = np.empty((len(rows), _SCALE_BYTES + rows.shape[1]), dtype=np.uint8)
    whole[:, :_SCALE_BYTES] = _on_cpu(step).numpy().astype("<f4").view(np.uint8)
    whole[:, _SCALE_BYTES:] = _on_cpu(bytes_).numpy().view(np.uint8)
    return whole.reshape(-1).data


def decode_rows(
    buffer: Bytes, dtype: torch.dtype, width: int, scale: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Tokens ``(N, width)`` from their bytes ``(N * row_bytes,)``; float16 and int8 come back as float32."""
    if dtype != torch.int8:
        return decode(buffer, dtype, scale, device).view(-1, width)
    whole = buffer.reshape(-1, _SCALE_BYTES + width)
    step = torch.from_numpy(
        np.ascontiguousarray(whole[:, :_SCALE_BYTES]).view("<f4").astype(np.float32)
    )  # (N, 1)
    numbers = torch.from_numpy(np.ascontiguousarray(whole[:, _SCALE_BYTES:]).view(np.int8))
    if device is not None:
        step, numbers = step.to(device, non_blocking=True), numbers.to(device, non_blocking=True)
    return numbers.float().mul_(step)


def decode_labels(buffer: Bytes) -> Tensor:
    """Labels ``(n,)`` int64 from their int32 bytes ``(4 n,)``."""
    return torch.from_numpy(buffer.view("<i4").astype(np.int64))


def put_images(packed: pb.Packed, images: Images) -> None:
    """Write the image spans of a batch into its header."""
    for sample, spans in enumerate(images):
        packed.images.extend(pb.ImageSpan(sample=sample, **span._asdict()) for span in spans)


def images_of(packed: pb.Packed) -> Images:
    """The image spans of a header, by sample.

    Raises:
        HostRefused: they are of no sample, out of order, or beyond their sample.
    """
    if not packed.images:
        return ()
    samples = [span.sample for span in packed.images]
    if max(samples) >= len(packed.lengths) or samples != sorted(samples):
        raise HostRefused(
            f"images: got those of sample {max(samples)}, expected 0 to {len(packed.lengths) - 1} in order"
        )
    found: list[list[ImageSpan]] = [[] for _ in packed.lengths]
    for span in packed.images:
        found[span.sample].append(ImageSpan(span.start, span.height, span.width))
    check_images(found, packed.lengths)
    return found


def pack(rows: Tensor, dtype: torch.dtype, lengths: Sequence[int]) -> tuple[pb.Packed, memoryview]:
    """Header and bytes of real tokens.

    Args:
        rows: ``(N, d)``, samples end to end.
        dtype: type on the wire.
        lengths: tokens of each sample, summing to N.
    """
    data, scale = (encode_rows(rows, dtype), 1.0) if dtype == torch.int8 else encode(rows, dtype)
    return pb.Packed(dtype=_CODES[dtype], hidden_size=rows.shape[1], lengths=lengths, scale=scale), data


def views(parts: Sequence[memoryview], size: int) -> Iterator[memoryview]:
    """Cut ``parts``, laid end to end, into pieces of ``size`` bytes; a piece never spans two parts."""
    for part in parts:
        for start in range(0, len(part), size):
            yield part[start : start + size]


@dataclass(frozen=True)
class Chunking:
    """How tensors are cut into messages.

    Attributes:
        nbytes: size of a chunk.
        lossless: whether redundancy is left out where there is some, see `fednano.host.planes`.
    """

    nbytes: int
    lossless: bool = False

    def messages(self, kind: Callable[..., M], parts: Sequence[memoryview]) -> Iterator[M]:
        """``parts``, laid end to end, as messages of ``kind`` with a ``chunk`` or ``coded`` each."""
        for view in views(parts, self.nbytes):
            coded = squeeze(view) if self.lossless else None
            yield kind(chunk=bytes(view)) if coded is None else kind(coded=coded)


class Assembler:
    """Collects chunks into one buffer of known length.

    Args:
        nbytes: length that the header announced.
        what: names the stream in errors.
        locked: whether a GPU shall read the buffer by itself, for which its pages are locked.
    """

    def __init__(self, nbytes: int, what: str, *, locked: bool = False) -> None:
        # Memory of torch is always aligned alike, so that results do not depend on where the bytes came to lie.
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=locked).numpy()
        self._at, self._what = 0, what

    def __len__(self) -> int:
        """Bytes announced."""
        return len(self._memory)

    @property
    def complete(self) -> bool:
        """Whether all announced bytes are there."""
        return self._at == len(self._memory)

    def add(self, chunk: bytes | memoryview | Bytes) -> None:
        """Append one chunk.

        Raises:
            HostRefused: the chunk is empty, or runs over the announced length.
        """
        end = self._at + len(chunk)
        if not len(chunk) or end > len(self._memory):
            raise HostRefused(
                f"{self._what}: got a chunk of {len(chunk)} bytes at byte {self._at}, "
                f"expected {len(self._memory)} bytes in all, as the header says"
            )
        self._memory[self._at : end] = np.frombuffer(chunk, dtype=np.uint8)
        self._at = end

    def add_coded(self, coded: bytes | memoryview) -> None:
        """Append one coded chunk.

        Raises:
            HostRefused: it is not one, or runs over the announced length.
        """
        room = len(self._memory) - self._at
        if room == 0:
            raise HostRefused(f"{self._what}: got a chunk after all {self._at} bytes had come")
        self.add(expand(coded, room))

    def add_frame(self, message: Any) -> None:
        """Append what a message holds in ``chunk`` or ``coded``.

        Raises:
            HostRefused: as `add` and `add_coded`; of another message, that it is empty.
        """
        if message.WhichOneof("frame") == "coded":
            self.add_coded(message.coded)
        else:
            self.add(message.chunk)

    def take(self, nbytes: int, offset: int = 0) -> Bytes:
        """Bytes ``[offset, offset + nbytes)`` of the finished buffer.

        Raises:
            HostRefused: the stream ended before all bytes came.
        """
        if not self.complete:
            raise HostRefused(
                f"{self._what}: got {self._at} bytes, expected {len(self._memory)} as the header says"
            )
        piece: Bytes = self._memory[offset : offset + nbytes]
        return piece
