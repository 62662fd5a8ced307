"""The two stages of pretraining: the encoder alone, then the whole model on questions.

The encoder goes first because forms are not learned when pixels and language start together. It is told which object
lies under each patch (its form and its paint), which is a far denser signal than one answer a picture. In the second
stage every picture carries several questions in one row, which do not see each other; that saves the picture's share of
the decoder's work. The encoder's own task stays on at a small weight, so that it keeps what it knows.

Arithmetic is bfloat16 with float32 master weights, single-threaded, and every batch is drawn from a generator seeded by
(seed, stage, step): same seed, same versions and same kind of machine give the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from pretraining.lean import lean
from pretraining.questions import Item, ask, caption, checklist, fact
from pretraining.scenes import Scenes, draw_scenes
from pretraining.vocabulary import COLOURS, SHAPES, WORDS

__all__ = ["PatchReader", "Schedule", "answer_loss", "pack", "train_encoder", "train_language"]

_IDS = {word: number for number, word in enumerate(WORDS)}
_BOS, _EOS, _IMAGE = _IDS["<bos>"], _IDS["<eos>"], _IDS["<image>"]
_ROOM = 64  # tokens behind each picture
_ENCODER_SHARE = 0.3  # weight of the encoder's own task in the second stage
_SCALE_SHARE = 0.03  # weight of what keeps the connector's output at unit scale

Report = Callable[[str], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains: ``steps`` of ``batch`` pictures, warm-up and cosine decay of ``rate``."""

    steps: int
    batch: int
    rate: float
    warmup: int = 100

    def at(self, step: int) -> float:
        """Learning rate at ``step``."""
        decay = 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.rate * min((step + 1) / self.warmup, 1.0) * decay


class PatchReader(nn.Module):
    """Throw-away heads: which form and which paint lie under each patch (one more class: none)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, len(SHAPES) + 1 + len(COLOURS) + 1)

    def forward(self, features: Tensor, shape: Tensor, colour: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``()`` of patches ``(N, 16, d)`` against classes ``(N, 16)``, and the share of forms read right."""
        logits = self.read(self.norm(features)).float().flatten(0, 1)
        forms, paints = logits.split([len(SHAPES) + 1, len(COLOURS) + 1], dim=-1)
        loss = F.cross_entropy(forms, shape.flatten()) + F.cross_entropy(paints, colour.flatten())
        covered = shape.flatten() < len(SHAPES)
        right = (forms.argmax(-1) == shape.flatten())[covered].float().mean()
        return loss, right


class _Optimiser:
    """AdamW over float32 copies; the parameters are bfloat16 within its ``with`` block and float32 again after it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.parameters: list[Tensor] = [p for module in modules for p in module.parameters()]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=1.0, betas=(0.9, 0.98), weight_decay=0.02, fused=True)

    def __enter__(self) -> _Optimiser:
        for parameter in self.parameters:
            parameter.data = parameter.data.bfloat16()
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.data = master

    def step(self, loss: Tensor, rate: float) -> None:
        """One step down the gradient of ``loss ()``, clipped to norm 1; what has no gradient stays as it is."""
        torch.autograd.backward(loss)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def _classes(scenes: Scenes, device: torch.device) -> tuple[Tensor, Tensor]:
    slot = np.maximum(scenes.owner, 0)
    shape = np.where(scenes.owner < 0, len(SHAPES), np.take_along_axis(scenes.shape, slot, 1))
    colour = np.where(scenes.owner < 0, len(COLOURS), np.take_along_axis(scenes.colour, slot, 1))
    return torch.from_numpy(shape).to(device), torch.from_numpy(colour).to(device)


def _pixels(scenes: Scenes, device: torch.device) -> Tensor:
    """As the image processor makes them, ``(N, 3, 64, 64)`` in [-1, 1]."""
    return (torch.from_numpy(scenes.pixels).to(device).float() / 127.5 - 1.0).bfloat16()


def _patches(tower: nn.Module, pixels: Tensor) -> Tensor:
    hidden: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-1]
    return hidden[:, 1:]


def _segment(item: Item) -> tuple[list[int], list[int]]:
    """Ids of one question with its answer and ``<eos>``, and what is to be predicted at each of them (or -100)."""
    words = item.answer.split()
    answer = [_IDS[word] for word in words] + [_EOS]
    question = [_IDS[word] for word in f"question : {item.question} answer :".split()]
    learned = [
        -100 if item.learned is not None and word not in item.learned else _IDS[word] for word in words
    ]
    return question + answer, [-100] * (len(question) - 1) + learned + [_EOS, -100]


def pack(rows: list[list[Item]], image_tokens: int) -> tuple[NDArray[np.int64], ...]:
    """Lay each row's items behind one picture.

    Returns:
        ids ``(N, T)``, labels ``(N, T)`` (-100 where nothing is predicted; a label stands at the position that
        predicts it), positions ``(N, T)`` as if each item stood alone behind the picture, and group ``(N, T)``:
        0 for ``<bos>``, 1 for the picture, 2, 3, ... for items that see the picture and -2, -3, ... for items
        that do not, -1 for padding.
    """
    prefix = 1 + image_tokens
    segments = [[_segment(item) for item in row] for row in rows]
    length = prefix + max(sum(len(ids) for ids, _ in row) for row in segments)
    shape = (len(rows), length)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    positions, group = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    ids[:, :prefix] = [_BOS] + [_IMAGE] * image_tokens
    positions[:, :prefix] = np.arange(prefix)
    group[:, :prefix] = [0] + [1] * image_tokens
    for index, row in enumerate(segments):
        start = prefix
        for number, (tokens, wanted) in enumerate(row):
            end = start + len(tokens)
            sees = rows[index][number].needs_image
            ids[index, start:end] = tokens
            labels[index, start:end] = wanted
            positions[index, start:end] = np.arange(len(tokens)) + (prefix if sees else 1)
            group[index, start:end] = number + 2 if sees else -number - 2
            start = end
    return ids, labels, positions, group


def _visible(group: Tensor) -> Tensor:
    """Additive mask ``(N, 1, T, T)`` in bfloat16: 0 where a token may look, very negative elsewhere."""
    query, key = group[:, :, None], group[:, None, :]
    allowed = (query == key) | (key == 0) | ((key == 1) & (query > 0))
    length = group.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=group.device).tril()
    mask = torch.zeros(allowed.shape, dtype=torch.bfloat16, device=group.device)
    return mask.masked_fill_(~(allowed & causal), torch.finfo(torch.bfloat16).min)[:, None]


def answer_loss(
    model: LlavaForConditionalGeneration, images: Tensor, packed: tuple[NDArray[np.int64], ...]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``()`` of the labelled tokens, and the share of yes/no answers that is right.

    Args:
        images: ``(N, 16, d)`` from the connector.
        packed: what :func:`pack` returns.
    """
    ids, labels, positions, group = (torch.from_numpy(array).to(images.device) for array in packed)
    embeds = model.model.language_model.embed_tokens(ids)
    embeds = torch.cat([embeds[:, :1], images, embeds[:, 1 + images.shape[1] :]], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=_visible(group), position_ids=positions, use_cache=False
    ).last_hidden_state
    wanted = labels >= 0
    logits = model.lm_head(hidden[wanted]).float()
    told = labels[wanted]
    binary = (told == _IDS["yes"]) | (told == _IDS["no"])
    right = (logits.argmax(-1) == told)[binary].float().mean()
    return F.cross_entropy(logits, told), right


def _steps(
    name: str, schedule: Schedule, seed: int, stage: int, report: Report
) -> Iterator[tuple[int, np.random.Generator, list[float]]]:
    """Yield the generator of each step and a list for what to report; speak up a few times on the way."""
    begun, window = time.perf_counter(), []
    every = max(schedule.steps // 20, 1)
    for step in range(schedule.steps):
        values: list[float] = []
        yield step, np.random.default_rng([seed, stage, step]), values
        window.append(values)
        if (step + 1) % every == 0:
            means = " ".join(f"{mean:.3f}" for mean in np.mean(window, axis=0))
            report(f"{name} {step + 1}/{schedule.steps} {time.perf_counter() - begun:.0f} s: {means}")
            window.clear()


def train_encoder(
    model: LlavaForConditionalGeneration, reader: PatchReader, schedule: Schedule, seed: int, report: Report
) -> None:
    """First stage, in place: the tower learns to tell what lies under each patch."""
    device = next(model.parameters()).device
    tower = model.model.vision_tower
    with lean(model), _Optimiser([tower, reader]) as optimiser:
        for step, rng, values in _steps("encoder: loss, forms right", schedule, seed, 1, report):
            scenes = draw_scenes(rng, schedule.batch)
            loss, right = reader(_patches(tower, _pixels(scenes, device)), *_classes(scenes, device))
            optimiser.step(loss, schedule.at(step))
            values += [loss.item(), right.item()]


def _items(rng: np.random.Generator, scenes: Scenes, row: int, early: bool) -> list[Item]:
    """What is asked about one picture: as many items as fit behind it."""
    items: list[Item] = []
    room = _ROOM
    while True:
        draw = rng.random()
        if draw < (0.4 if early else 0.1):
            item = checklist(rng, scenes, row)
        elif draw < (0.45 if early else 0.18):
            item = caption(rng, scenes, row)
        elif draw < (0.5 if early else 0.26):
            item = fact(rng)
        else:
            item = ask(rng, scenes, row, negated_share=0.0 if early else 0.5)
        room -= len(_segment(item)[0])
        if room < 0:
            return items
        items.append(item)


def train_language(
    model: LlavaForConditionalGeneration, reader: PatchReader, schedule: Schedule, seed: int, report: Report
) -> None:
    """Second stage, in place: the whole model learns to answer.

    The first third has many checklists, and negated questions come after it only. Were they half of all from
    the start, then whether a thing is there would say nothing about "yes" or "no" until negation is understood,
    and the reverse.
    """
    device = next(model.parameters()).device
    tower = model.model.vision_tower
    with lean(model), _Optimiser([model, reader]) as optimiser:
        title = "language: loss, yes/no right, forms right, scale drift"
        for step, rng, values in _steps(title, schedule, seed, 2, report):
            scenes = draw_scenes(rng, schedule.batch)
            early = 3 * step < schedule.steps
            rows = [_items(rng, scenes, row, early) for row in range(schedule.batch)]
            packed = pack(rows, model.config.image_seq_length)
            features = _patches(tower, _pixels(scenes, device))
            images = model.model.multi_modal_projector(features)
            told, right = answer_loss(model, images, packed)
            seen, forms = reader(features, *_classes(scenes, device))
            drift = images.float().square().mean().log().square()
            optimiser.step(told + _ENCODER_SHARE * seen + _SCALE_SHARE * drift, schedule.at(step))
            values += [told.item(), right.item(), forms.item(), drift.item()]
