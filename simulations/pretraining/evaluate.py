"""Exact match of greedy answers, on easy-VQA's test set and on pictures of our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from pretraining.questions import ask
from pretraining.scenes import draw_scenes
from pretraining.vocabulary import build_processor

__all__ = ["Score", "easy_vqa_questions", "own_accuracy", "zero_shot"]

_YES_NO = frozenset(("yes", "no"))


@dataclass(frozen=True)
class Score:
    """Share of right answers over all questions and by kind of answer; ``questions`` is their number."""

    accuracy: float
    by_kind: dict[str, float]
    questions: int


def easy_vqa_questions(
    split: str, limit: int | None = None
) -> tuple[list[Image.Image], list[str], list[str]]:
    """Pictures, questions and answers of easy-VQA's ``split`` ("train" or "test").

    Args:
        limit: take this many questions, spread evenly over the set; None takes all.
    """
    import easy_vqa

    part = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    paths = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()
    texts, answers, numbers = part()
    chosen = (
        range(len(texts)) if limit is None else np.linspace(0, len(texts) - 1, limit).astype(int).tolist()
    )
    pictures: dict[int, Image.Image] = {}
    for index in chosen:
        if numbers[index] not in pictures:
            with Image.open(paths[numbers[index]]) as opened:
                pictures[numbers[index]] = opened.convert("RGB")
    return (
        [pictures[numbers[index]] for index in chosen],
        [texts[index] for index in chosen],
        [answers[index] for index in chosen],
    )


def _answers(
    model: LlavaForConditionalGeneration, pictures: Sequence[Image.Image], texts: Sequence[str], batch: int
) -> list[str]:
    processor = build_processor()
    out: list[str] = []
    for start in range(0, len(texts), batch):
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
            )
            for text in texts[start : start + batch]
        ]
        inputs = processor(
            text=prompts, images=list(pictures[start : start + batch]), padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            tokens: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        told = tokens[:, inputs["input_ids"].shape[1] :]
        out += processor.batch_decode(told, skip_special_tokens=True)
    return out


def _score(given: Sequence[str], expected: Sequence[str]) -> Score:
    kinds = ["yes/no" if answer in _YES_NO else "other" for answer in expected]
    total = Counter(kinds)
    right = Counter(kind for kind, a, b in zip(kinds, given, expected, strict=True) if a == b)
    return Score(
        accuracy=sum(right.values()) / len(expected),
        by_kind={kind: right[kind] / total[kind] for kind in sorted(total)},
        questions=len(expected),
    )


def zero_shot(model: LlavaForConditionalGeneration, limit: int | None = None, batch: int = 256) -> Score:
    """Accuracy on easy-VQA's test set (9,673 questions, or ``limit`` spread over it), as the model is."""
    pictures, texts, answers = easy_vqa_questions("test", limit)
    return _score(_answers(model, pictures, texts, batch), answers)


def own_accuracy(model: LlavaForConditionalGeneration, seed: int, questions: int = 1000) -> Score:
    """Accuracy on fresh pictures and questions of the pretraining kind."""
    rng = np.random.default_rng([seed, 3])
    scenes = draw_scenes(rng, questions)
    items = [ask(rng, scenes, row) for row in range(questions)]
    pictures = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in scenes.pixels]
    given = _answers(model, pictures, [item.question for item in items], 256)
    return _score(given, [item.answer for item in items])
