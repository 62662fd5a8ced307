"""Attacks of a language host on the embeddings that it is sent: words by nearest neighbour, images by regression.

The host knows the public model, so it has the table of token embeddings and can encode images of its own. As the
server's operator it also knows the merged adapters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fednano.data import Sample, decode_image
from fednano.host.codec import decode, decode_labels, decode_rows, encode, encode_rows
from fednano.models.edge import NanoEdge
from fednano.privacy.audit.finding import Finding
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache

__all__ = ["Protection", "answers_from_labels", "images_from_features", "received", "words_from_embeddings"]

_BLOCK = 4  # pixels a side that an image token is decoded to
_ROWS = 512


@dataclass(frozen=True)
class Protection:
    """What a client does to its embeddings before they leave.

    Attributes:
        wire_dtype: number format, as the setting of that name.
        noise: standard deviation of Gaussian noise, over the root mean square of the embeddings; 0 is what runs send.
    """

    wire_dtype: str
    noise: float = 0.0

    def __str__(self) -> str:
        return self.wire_dtype + (f", noise {self.noise:g}" if self.noise else "")


def received(rows: Tensor, protection: Protection, draw: torch.Generator) -> Tensor:
    """The rows ``(N, d)`` as the host gets them, float32: through the codec of the wire, after noise."""
    rows = rows.detach().float().cpu()
    if protection.noise:
        scale = protection.noise * float(rows.square().mean().sqrt())
        rows = rows + scale * torch.randn(rows.shape, generator=draw)
    dtype = getattr(torch, protection.wire_dtype)
    if dtype == torch.int8:
        return decode_rows(np.frombuffer(encode_rows(rows, dtype), np.uint8), dtype, rows.shape[1])
    sent, factor = encode(rows, dtype)
    return decode(np.frombuffer(sent, np.uint8).copy(), dtype, factor).float().view(-1, rows.shape[1])


def words_from_embeddings(
    edge: NanoEdge,
    samples: Sequence[Sample],
    protections: Sequence[Protection],
    cache: FeatureCache,
    seed: int,
) -> list[Finding]:
    """Find each text token by the nearest row of the embedding table, adapted or not.

    Tokens that stand in every prompt (the template's) are no secret and are not counted.
    """
    data = ClientData(samples, edge, cache)
    rows, ids = [], []
    for index in range(len(samples)):
        prompts, features = data.batch([index])
        with torch.no_grad():
            batch = edge(prompts, features)
        text = _text_positions(edge, batch.streams, batch.mask)
        rows.append(batch.embeds[0][text])
        prompt = prompts[0]
        whole = torch.tensor([i for i in (*prompt.ids, *prompt.answer) if i != edge.edge.image_token_id])
        ids.append(whole[: int(text.sum())])
    template = set.intersection(*(set(own.tolist()) for own in ids))
    sent, truth = torch.cat(rows), torch.cat(ids)
    secret = torch.tensor([int(i) not in template for i in truth])
    every = torch.arange(edge.edge.vocabulary)
    with torch.no_grad():
        tables = {
            "host that knows the public model": edge.edge.embed(every),
            "host that also knows the adapters": edge.embed_new(every),
        }
    commonest = int(truth[secret].bincount().max()) / int(secret.sum())
    found = []
    for protection in protections:
        draw = torch.Generator().manual_seed(seed)
        seen = received(sent, protection, draw)[secret]
        for attacker, table in tables.items():
            guess = torch.cat(
                [torch.cdist(part, table.float()).argmin(1) for part in torch.split(seen, _ROWS)]
            )
            right = float((guess == truth[secret]).double().mean())
            found.append(
                Finding(
                    *("words from embeddings", attacker, str(protection), "tokens recovered"),
                    *(right, commonest, int(secret.sum())),
                )
            )
    return found


def answers_from_labels(edge: NanoEdge, samples: Sequence[Sample], cache: FeatureCache) -> Finding:
    """Read the labels that travel with each step; the host needs them to compute the loss."""
    data, right = ClientData(samples, edge, cache), 0
    for index, sample in enumerate(samples):
        batch = edge(*data.batch([index]))
        labels = decode_labels(batch.labels[0].to(torch.int32).numpy().astype("<i4").view(np.uint8))
        text = edge.edge.tokenizer.decode(labels[labels >= 0].tolist(), skip_special_tokens=True)
        right += text.strip() == sample.answer.strip()
    commonest = Counter(sample.answer for sample in samples).most_common(1)[0][1] / len(samples)
    return Finding(
        *("answers from the wire", "host", "labels travel with each step", "answers read"),
        *(right / len(samples), commonest, len(samples)),
    )


def _text_positions(edge: NanoEdge, streams: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Positions of text of a lone sample ``(T,)``: whatever is no image."""
    if "text" in streams:
        return streams["text"][0]
    return mask[0] & ~streams["image"][0] if "image" in streams else mask[0]


def images_from_features(
    edge: NanoEdge,
    victims: Sequence[Sample],
    public: Sequence[Sample],
    protections: Sequence[Protection],
    cache: FeatureCache,
    seed: int,
) -> tuple[list[Finding], Image.Image | None]:
    """Decode image tokens into pixels, by ridge regression on images that the host has itself.

    Returns:
        Findings, and a picture: originals in the first row, what each setting gives away of them below. Nothing where
        the samples have no images.
    """
    targets, inputs = {}, {}
    for name, samples in (("victims", _with_images(victims)), ("public", _with_images(public))):
        if not samples or "image" not in edge.layers:
            return [], None
        data = ClientData(samples, edge, cache)
        rows = []
        for index in range(len(samples)):
            with torch.no_grad():
                batch = edge(*data.batch([index]))
            rows.append(batch.embeds[0][batch.streams["image"][0]])
        if len({len(row) for row in rows}) > 1:
            return [], None  # images of different numbers of tokens
        inputs[name] = torch.stack(rows).float()  # (n, tokens, d)
        side = math.isqrt(inputs[name].shape[1])
        if side * side != inputs[name].shape[1]:
            return [], None
        targets[name] = torch.stack([_blocks(sample, side) for sample in samples])  # (n, tokens, 48)
    mean = targets["public"].mean(0)
    plain = _psnr(mean.expand_as(targets["victims"]), targets["victims"])
    found, strips = [], [_strip(targets["victims"])]
    for protection in protections:
        draw = torch.Generator().manual_seed(seed)
        width = inputs["public"].shape[-1]
        known, seen = (
            received(inputs[name].reshape(-1, width), protection, draw).view(inputs[name].shape)
            for name in ("public", "victims")
        )
        guess = _regress(known, targets["public"], seen)
        found.append(
            Finding(
                *("images from features", "host with images of its own", str(protection), "PSNR, dB"),
                *(_psnr(guess, targets["victims"]), plain, len(seen)),
            )
        )
        strips.append(_strip(guess))
    return found, Image.fromarray(np.concatenate(strips))


def _with_images(samples: Sequence[Sample]) -> list[Sample]:
    """One sample for each image."""
    by_path = {sample.image: sample for sample in samples if sample.image is not None}
    return list(by_path.values())


def _blocks(sample: Sample, side: int) -> Tensor:
    """A sample's image as a block of pixels for each token, ``(side * side, 3 * _BLOCK**2)`` in [0, 1]."""
    assert sample.image is not None
    size = side * _BLOCK
    pixels = np.asarray(decode_image(sample.image).resize((size, size)), np.float32) / 255.0
    cut = pixels.reshape(side, _BLOCK, side, _BLOCK, 3).transpose(0, 2, 1, 3, 4)
    return torch.from_numpy(np.ascontiguousarray(cut)).reshape(side * side, -1)


def _regress(known: Tensor, pixels: Tensor, seen: Tensor) -> Tensor:
    """Ridge regression from a token's row, with its place, to its block; the penalty is a thousandth of the trace."""

    def design(rows: Tensor) -> Tensor:
        places = torch.eye(rows.shape[1]).expand(len(rows), -1, -1)
        return torch.cat([rows, places], dim=-1).reshape(len(rows) * rows.shape[1], -1).double()

    x, y = design(known), pixels.reshape(-1, pixels.shape[-1]).double()
    gram = x.T @ x
    penalty = 1e-3 * float(gram.trace()) / len(gram)
    weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=torch.float64), x.T @ y)
    decoded: Tensor = (design(seen) @ weights).float().view(*seen.shape[:2], -1)
    return decoded.clamp(0, 1)


def _psnr(guess: Tensor, truth: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio, in dB."""
    errors = (guess - truth).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * errors.log10()).mean())


def _strip(blocks: Tensor, count: int = 8) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The first images side by side, each pixel four wide."""
    side = math.isqrt(blocks.shape[1])
    whole = blocks[:count].reshape(-1, side, side, _BLOCK, _BLOCK, 3).permute(0, 1, 3, 2, 4, 5)
    rows = whole.reshape(-1, side * _BLOCK, side * _BLOCK, 3)
    wide = torch.cat(list(rows), dim=1).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return np.asarray((wide * 255).round().to(torch.uint8).numpy())
