"""What a language model accepts, and how padding is taken out of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fednano.errors import HostRefused

__all__ = ["IGNORE", "align", "check_inputs", "check_token_embeds"]

IGNORE = -100
"""Label of a position without loss (the value Hugging Face uses)."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    embeds: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    *,
    hidden_size: int,
    vocab_size: int,
    max_positions: int,
    new_tokens: int = 0,
) -> None:
    """Refuse what a language model cannot compute.

    Args:
        embeds: ``(B, T, d)`` float.
        mask: ``(B, T)`` bool or 0/1 integers.
        labels: ``(B, T)`` int64, or ``None`` for generation.
        hidden_size: the model's d.
        vocab_size: the model's V.
        max_positions: the model's context window.
        new_tokens: how many tokens will be appended to each row.

    Raises:
        HostRefused: naming the sample at fault, what was got and what was expected.
    """
    if embeds.dim() != 3 or embeds.shape[2] != hidden_size:
        raise HostRefused(
            f"embeds: got shape {tuple(embeds.shape)}, expected (B, T, {hidden_size}): "
            "the last size is the model's hidden size"
        )
    if embeds.shape[0] == 0 or embeds.shape[1] == 0:
        raise HostRefused(
            f"embeds: got shape {tuple(embeds.shape)}, expected at least one sample and one token"
        )
    if embeds.dtype not in _FLOATS:
        raise HostRefused(f"embeds: got dtype {embeds.dtype}, expected float32, bfloat16 or float16")
    grid = tuple(embeds.shape[:2])
    if tuple(mask.shape) != grid:
        raise HostRefused(f"mask: got shape {tuple(mask.shape)}, expected {grid} as embeds")
    if (
        mask.is_floating_point()
        or mask.is_complex()
        or (mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()))
    ):
        raise HostRefused(f"mask: got dtype {mask.dtype}, expected booleans, or integers that are 0 or 1")
    real = mask.bool()
    lengths = real.sum(1)
    if bool((lengths == 0).any()):
        raise HostRefused(
            f"mask: sample {_first(lengths == 0)} has no token; expected at least one per sample"
        )
    holes = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1
    if bool(holes.any()):
        raise HostRefused(
            f"mask: sample {_first(holes)} has padding between tokens; "
            "expected one contiguous run, padded left or right"
        )
    long = lengths + new_tokens > max_positions
    if bool(long.any()):
        i = _first(long)
        extra = f" and asks for {new_tokens} new ones" if new_tokens else ""
        raise HostRefused(
            f"sample {i} has {int(lengths[i])} tokens{extra}; "
            f"the model has {max_positions} positions: shorten it"
        )
    finite = embeds.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise HostRefused(
            f"embeds: sample {_first(~finite)} holds NaN or infinity; "
            "expected finite numbers (has the training diverged?)"
        )
    if labels is not None:
        _check_labels(labels, real, vocab_size)


def _check_labels(labels: Tensor, real: Tensor, vocab_size: int) -> None:
    if tuple(labels.shape) != tuple(real.shape):
        raise HostRefused(f"labels: got shape {tuple(labels.shape)}, expected {tuple(real.shape)} as embeds")
    if labels.dtype != torch.int64:
        raise HostRefused(f"labels: got dtype {labels.dtype}, expected torch.int64")
    real = real.to(labels.device)
    used = labels != IGNORE
    wrong = used & ((labels < 0) | (labels >= vocab_size))
    if bool(wrong.any()):
        i = _first(wrong.any(1))
        value = int(labels[i][wrong[i]][0])
        raise HostRefused(
            f"labels: sample {i} has label {value}; "
            f"expected {IGNORE} or 0 to {vocab_size - 1}: is this another vocabulary?"
        )
    stray = (used & ~real).any(1)
    if bool(stray.any()):
        raise HostRefused(
            f"labels: sample {_first(stray)} has a label on padding; "
            f"expected {IGNORE} wherever the mask is false"
        )
    counted = (used[:, 1:] & real[:, :-1]).any(1)
    if not bool(counted.all()):
        raise HostRefused(
            f"labels: sample {_first(~counted)} has no label after its first token, "
            "so its mean loss does not exist; leave it out"
        )


def check_token_embeds(embeds: Tensor, samples: int, hidden_size: int) -> None:
    """Refuse what a `TokenEmbedding` must not return.

    Raises:
        HostRefused: ``embeds`` is not a finite ``(samples, hidden_size)``.
    """
    if tuple(embeds.shape) != (samples, hidden_size) or not bool(embeds.isfinite().all()):
        got = (
            f"shape {tuple(embeds.shape)}"
            if tuple(embeds.shape) != (samples, hidden_size)
            else "NaN or infinity"
        )
        raise HostRefused(f"embed: got {got}, expected finite ({samples}, {hidden_size}): one row per sample")


def _first(flags: Tensor) -> int:
    return int(flags.int().argmax())


def align(embeds: Tensor, mask: Tensor, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Move each row's real tokens to one edge and drop columns that no row needs.

    Args:
        embeds: ``(B, T, d)``.
        mask: ``(B, T)`` bool, one run of true per row.
        side: the edge, "left" or "right".

    Returns:
        embeds ``(B, L, d)`` with zeros as padding; real ``(B, L)`` bool; index ``(B, L)`` of each place in
        the old row.
    """
    lengths = mask.sum(1, keepdim=True)  # (B, 1)
    start = mask.int().argmax(1, keepdim=True)
    longest = int(lengths.max())
    place = torch.arange(longest, device=mask.device).unsqueeze(0)
    if side == "right":
        place = place - (longest - lengths)
    real = (place >= 0) & (place < lengths)
    index = torch.where(real, place + start, 0)
    if bool(mask.all()):
        return embeds, real, index
    rows = embeds.gather(1, index.unsqueeze(-1).expand(-1, -1, embeds.shape[2]))
    return torch.where(real.unsqueeze(-1), rows, 0), real, index
