"""What a language model must know of images beyond their embeddings: where they stand, and on which grid.

Most decoders treat image tokens as text. Two kinds do not. Those with multimodal rotary positions (M-RoPE, Qwen2-VL,
arXiv:2409.12191) number an image's tokens by time, row and column, and go on behind it from the largest number. Gemma 3
(arXiv:2503.19786) lets an image's tokens see each other both ways. Both follow from the spans of a sample's images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fednano.errors import HostRefused

__all__ = [
    "ImageSpan",
    "ImageUse",
    "Images",
    "MaskMaker",
    "check_images",
    "decoder_inputs",
    "next_positions",
]


class ImageUse(StrEnum):
    """What a decoder makes of image spans."""

    PLAIN = "plain"
    """Nothing: image tokens are like text."""
    GRID = "grid"
    """Positions in time, row and column."""
    BLOCK = "block"
    """Attention both ways inside an image."""


class ImageSpan(NamedTuple):
    """An image in a sample: ``height * width`` consecutive tokens, row by row.

    Attributes:
        start: place of its first token, counted from the sample's first real token.
        height: rows of tokens.
        width: tokens of a row.
    """

    start: int
    height: int
    width: int

    @property
    def end(self) -> int:
        """Place behind its last token."""
        return self.start + self.height * self.width


Images: TypeAlias = Sequence[Sequence[ImageSpan]]
"""The images of each sample of a batch, in order; empty where no sample has any."""

MaskMaker: TypeAlias = Callable[..., dict[str, Tensor]]
"""Attention masks by kind of layer, as a model's own ``create_masks_for_generate`` makes them."""


def check_images(images: Images, lengths: Sequence[int]) -> None:
    """Refuse spans that cannot be.

    Args:
        images: of a batch.
        lengths: real tokens of each sample.

    Raises:
        HostRefused: naming the sample, what was got and what was expected.
    """
    if not images:
        return
    if len(images) != len(lengths):
        raise HostRefused(f"images: got those of {len(images)} samples, expected {len(lengths)}")
    for sample, (spans, length) in enumerate(zip(images, lengths, strict=True)):
        at = 0
        for span in spans:
            sound = span.height > 0 and span.width > 0 and at <= span.start and span.end <= length
            if not sound:
                raise HostRefused(
                    f"images: sample {sample} of {length} tokens has an image of {span.height} x {span.width} tokens "
                    f"at {span.start}; expected images in order, side by side, inside the sample"
                )
            at = span.end


def _grid_positions(spans: Sequence[ImageSpan], length: int) -> Tensor:
    """Positions ``(3, length)`` in time, row and column; text has the same in all three."""
    parts: list[Tensor] = []
    at = position = 0
    for span in (*spans, ImageSpan(length, 0, 0)):
        text = torch.arange(span.start - at) + position
        parts.append(text.expand(3, -1))
        position += span.start - at
        rows = torch.arange(span.height).repeat_interleave(span.width)
        columns = torch.arange(span.width).repeat(span.height)
        parts.append(torch.stack([torch.zeros_like(rows), rows, columns]) + position)
        position += max(span.height, span.width)
        at = span.end
    return torch.cat(parts, 1)


def next_positions(use: ImageUse, images: Images, lengths: Sequence[int]) -> Tensor:
    """Position ``(B,)`` of the token that would follow each sample."""
    found = torch.tensor(list(lengths))
    if use is ImageUse.GRID and images:
        for sample, spans in enumerate(images):
            found[sample] -= sum(span.height * span.width - max(span.height, span.width) for span in spans)
    return found


def decoder_inputs(
    use: ImageUse,
    masks: MaskMaker | None,
    x: Tensor,
    images: Images,
    lengths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Positions and attention mask of a forward pass, as arguments of a decoder.

    Args:
        use: what the decoder makes of images.
        masks: makes masks with blocks, see `ImageUse.BLOCK`.
        x: ``(B, L, d)`` embeddings; the real tokens of each row begin at the left, or at the right end if ``lengths``
            are given.
        images: of the batch.
        lengths: real tokens of each row, for a batch that is padded at the left.
    """
    samples, longest = x.shape[:2]
    pads = [0] * samples if lengths is None else [longest - length for length in lengths]
    mask = None
    if lengths is None:
        positions = torch.arange(longest, device=x.device).unsqueeze(0)
    else:
        positions = (torch.arange(longest) - torch.tensor(pads).unsqueeze(1)).clamp(min=0)
        mask = (torch.arange(longest) >= torch.tensor(pads).unsqueeze(1)).long().to(x.device)
    found = any(len(spans) for spans in images)
    if use is ImageUse.GRID and found:
        positions = torch.zeros(3, samples, longest, dtype=torch.int64)
        for row, (spans, pad) in enumerate(zip(images, pads, strict=True)):
            positions[:, row, pad:] = _grid_positions(spans, longest - pad)
    positions = positions.to(x.device, non_blocking=True)
    arguments: dict[str, Any] = {"position_ids": positions, "attention_mask": mask}
    if use is ImageUse.BLOCK and found:
        assert masks is not None
        kinds = torch.zeros(samples, longest, dtype=torch.int64)
        for row, (spans, pad) in enumerate(zip(images, pads, strict=True)):
            for span in spans:
                kinds[row, pad + span.start : pad + span.end] = 1
        arguments["attention_mask"] = masks(
            inputs_embeds=x,
            attention_mask=mask,
            past_key_values=None,
            position_ids=positions,
            token_type_ids=kinds.to(x.device, non_blocking=True),
        )
    return arguments
