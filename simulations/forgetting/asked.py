"""A small language model that is asked questions: its losses, its answers, and training of all its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fednano.training.seeds import generator
from forgetting.stories import BOS, EOS

__all__ = ["Asked", "Row", "means", "pairs_of", "rows_in", "train"]

Row = dict[str, Any]


class Asked:
    """A model with its tokenizer, asked for losses and answers."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def ids(self, question: str, answer: str | None) -> tuple[list[int], list[int]]:
        """Tokens of a question and its answer, the latter with its end."""
        prompt = [BOS, *self.tokenizer(question).input_ids]
        return prompt, [] if answer is None else [*self.tokenizer(answer).input_ids, EOS]

    def logits(self, pairs: Sequence[tuple[str, str]], *, end: bool) -> tuple[Tensor, Tensor, list[int]]:
        """Logits at every answer token ``(N, V)``, the tokens ``(N,)``, and how many each pair has."""
        both = [self.ids(question, answer) for question, answer in pairs]
        length = max(len(p) + len(a) for p, a in both)
        tokens = torch.zeros(len(both), length, dtype=torch.int64)
        wanted = torch.zeros(len(both), length, dtype=torch.bool)
        for row, (p, a) in enumerate(both):
            tokens[row, : len(p) + len(a)] = torch.tensor(p + a)
            wanted[row, len(p) : len(p) + len(a) - (0 if end else 1)] = True
        # Padded on the right of a causal model: what follows an answer cannot change it.
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        keep = wanted[:, 1:]
        return self.model.lm_head(hidden[keep]), tokens[:, 1:][keep], keep.sum(1).tolist()

    def losses(self, pairs: Sequence[tuple[str, str]], *, end: bool = True) -> Tensor:
        """Mean loss of each answer ``(B,)``, nats a token."""
        logits, wanted, counts = self.logits(pairs, end=end)
        return means(F.cross_entropy(logits.float(), wanted, reduction="none"), counts)

    @torch.no_grad()
    def all_losses(self, pairs: Sequence[tuple[str, str]], *, end: bool = True) -> list[float]:
        """As `losses`, of any number of pairs, without gradients."""
        found: list[float] = []
        for start in range(0, len(pairs), 25):
            found += self.losses(pairs[start : start + 25], end=end).tolist()
        return found

    @torch.no_grad()
    def answers(self, questions: Sequence[str], tokens: int) -> list[str]:
        """Greedy answers."""
        prompts = [self.ids(question, None)[0] for question in questions]
        length = max(map(len, prompts))
        ids = torch.zeros(len(prompts), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = torch.tensor(prompt), 1
        said = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return [
            text.strip() for text in self.tokenizer.batch_decode(said[:, length:], skip_special_tokens=True)
        ]


def means(each: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean of each answer's tokens: ``(N,)`` to ``(B,)``."""
    return torch.stack([part.mean() for part in torch.split(each, list(counts))])


def rows_in(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def pairs_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Questions and answers."""
    return [(row["question"], row["answer"]) for row in rows]


def train(model: Asked, rows: Sequence[Row], *, epochs: int, rate: float, seed: int) -> None:
    """Train every weight; linear decay after a warm-up of one epoch."""
    model.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=rate, weight_decay=0.0)
    size, pairs = 10, pairs_of(rows)
    per_epoch = math.ceil(len(pairs) / size)
    total, step = epochs * per_epoch, 0
    for epoch in range(epochs):
        order = generator(seed, "memorise", epoch).permutation(len(pairs))
        for start in range(0, len(pairs), size):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(step / per_epoch, (total - step + 1) / total)
            optimizer.zero_grad(set_to_none=True)
            model.losses([pairs[int(i)] for i in order[start : start + size]]).mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
            optimizer.step()
    model.model.eval().requires_grad_(False)
