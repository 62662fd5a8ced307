"""The paper's setting in small: a language model memorises TOFU authors, then unlearns some of them by LoRA.

stories260K is trained whole on five questions each of 40 TOFU authors: the 20 of ``forget10``, among which are those of
``forget05`` and ``forget01``, and 20 that stay. Each method then trains low-rank adapters on the frozen result for five
epochs over the forget set, each batch beside as many random retained questions, and is compared with a model that was
trained without the authors: forget quality (Kolmogorov-Smirnov on truth ratios) over model utility with its nine parts.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fednano.adapters import AdapterSet, attach, create
from fednano.runs.atomic import write_json
from fednano.training.objectives import dpo, inverted_hinge, kl_divergence, npo, simnpo
from fednano.training.seeds import generator
from fednano.unlearning.fila import as_lora, attach_fila
from fednano.unlearning.fisher import weight_fisher
from fednano.unlearning.metrics import (
    extraction_strength,
    forget_quality,
    model_utility,
    rouge_l,
    truth_ratio,
    truth_ratio_score,
)
from forgetting.asked import Asked, Row, means, pairs_of, rows_in, train
from forgetting.stories import stories_model, stories_tokenizer

__all__ = [
    "BASELINES",
    "LOW_RANK",
    "RANKS",
    "SPLITS",
    "judged",
    "memorise",
    "unlearn_authors",
]

SPLITS = {"01": 2, "05": 10, "10": 20}
"""Split to the number of its authors, the last ones of ``forget10``."""
RANKS = (4, 8, 16, 32)
LOW_RANK = ("gradient_difference", "ihl", "gradient_difference+fila", "loku")
BASELINES = ("gradient_ascent", "kl", "npo", "simnpo", "dpo", "idk")
REFUSAL = "I do not know."
PER_AUTHOR, EPOCHS, BATCH = 5, 5, 5
_LINEARS = "model.layers.*.{self_attn.{q,o}_proj,mlp.{gate,up,down}_proj}"
_ASKED = 30
"""Questions of each part of the utility."""
_FISHER = 32
"""Most samples of a Fisher."""


@dataclass(frozen=True)
class _Data:
    """Rows of TOFU: question, answer, and other answers.

    Attributes:
        forget: the questions of the 20 authors of ``forget10``, author by author.
        retain: those of the authors that stay.
        real: real authors.
        world: world facts.
    """

    forget: list[Row]
    retain: list[Row]
    real: list[Row]
    world: list[Row]

    def gone(self, split: str) -> list[Row]:
        return self.forget[-SPLITS[split] * PER_AUTHOR :]

    def without(self, split: str) -> list[Row]:
        return [*self.forget[: -SPLITS[split] * PER_AUTHOR], *self.retain]


def _load(tofu: Path, tokenizer: Any) -> _Data:
    def chosen(rows: list[Row]) -> list[Row]:
        authors = [rows[start : start + 20] for start in range(0, len(rows), 20)]
        shortest = [sorted(own, key=lambda row: len(tokenizer(row["answer"]).input_ids)) for own in authors]
        return [row for own in shortest for row in own[:PER_AUTHOR]]

    return _Data(
        chosen(rows_in(tofu / "forget10_perturbed.json")),
        chosen(rows_in(tofu / "retain_perturbed.json")),
        rows_in(tofu / "real_authors_perturbed.json")[:_ASKED],
        rows_in(tofu / "world_facts_perturbed.json")[:_ASKED],
    )


def memorise(work: Path, tofu: Path, stories: Path, split: str, seed: int, *, epochs: int) -> float:
    """Train the model of a split (``"full"``, or one without the split's authors), once; returns its seconds."""
    path = work / "language" / f"{split}-{seed}.safetensors"
    note = path.with_suffix(".json")
    if not note.exists():
        torch.set_num_threads(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        model = Asked(stories_model(stories), stories_tokenizer(stories))
        data = _load(tofu, model.tokenizer)
        rows = [*data.forget, *data.retain] if split == "full" else data.without(split)
        began = time.perf_counter()
        train(model, rows, epochs=epochs, rate=3e-3, seed=seed)
        seconds = time.perf_counter() - began
        save_file({n: v.clone() for n, v in model.model.state_dict().items() if n != "lm_head.weight"}, path)
        note.write_text(json.dumps({"seconds": seconds}))
    found: float = json.loads(note.read_text())["seconds"]
    return found


def _stored(work: Path, stories: Path, split: str, seed: int) -> Asked:
    model = stories_model(stories)
    state = load_file(work / "language" / f"{split}-{seed}.safetensors")
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return Asked(model.requires_grad_(False).eval(), stories_tokenizer(stories))


def _ratios(model: Asked, rows: Sequence[Row], paraphrase: str) -> list[float]:
    found = []
    for row in rows:
        other = [row[paraphrase], *row["perturbed_answer"]]
        losses = model.all_losses([(row["question"], text) for text in other])
        found.append(truth_ratio(losses[1:], losses[0]))
    return found


def _utility(model: Asked, data: _Data) -> dict[str, float]:
    parts = {}
    for name, rows, paraphrase in (
        ("retain", data.retain[:: len(data.retain) // _ASKED][:_ASKED], "paraphrased_answer"),
        ("real_authors", data.real, "answer"),
        ("world_facts", data.world, "answer"),
    ):
        right = [math.exp(-loss) for loss in model.all_losses(pairs_of(rows))]
        if name != "retain":
            wrong = [
                math.fsum(
                    math.exp(-x)
                    for x in model.all_losses([(r["question"], w) for w in r["perturbed_answer"]])
                )
                for r in rows
            ]
            right = [p / (p + q) for p, q in zip(right, wrong, strict=True)]
        longest = max(len(model.tokenizer(row["answer"]).input_ids) for row in rows)
        said = model.answers([row["question"] for row in rows], longest)
        parts[f"{name}.probability"] = fmean(right)
        parts[f"{name}.rouge_l"] = fmean(
            rouge_l(s, row["answer"]).recall for s, row in zip(said, rows, strict=True)
        )
        parts[f"{name}.truth_ratio"] = truth_ratio_score(_ratios(model, rows, paraphrase), forget=False)
    return parts


def _without_zeros(parts: dict[str, float]) -> float:
    """Harmonic mean of seven of the nine parts of the model utility.

    A model that has read children's stories answers no question about real authors or the world, so that these two
    ROUGE parts are 0 before and after, and with them the model utility.
    """
    left = [v for n, v in parts.items() if n not in ("real_authors.rouge_l", "world_facts.rouge_l")]
    return 0.0 if min(left) <= 0 else len(left) / math.fsum(1 / v for v in left)


@torch.no_grad()
def _memory(model: Asked, rows: Sequence[Row]) -> dict[str, float]:
    right, strength, losses = [], [], []
    for start in range(0, len(rows), 25):
        logits, wanted, counts = model.logits(pairs_of(rows[start : start + 25]), end=False)
        hits = logits.argmax(-1) == wanted
        for part in torch.split(hits, counts):
            right.append(float(part.float().mean()))
            strength.append(extraction_strength(part.numpy()))
        losses += means(F.cross_entropy(logits, wanted, reduction="none"), counts).tolist()
    return {
        "exact_memorisation": fmean(right),
        "extraction_strength": fmean(strength),
        "probability": fmean(math.exp(-loss) for loss in losses),
    }


def _adapt(model: Asked, method: str, rank: int, gone: list[Row], kept: list[Row], seed: int) -> AdapterSet:
    """Low-rank adapters at the start of a method: fresh, or FILA's on the model's own weights."""
    if method not in ("loku", "gradient_difference+fila"):
        return attach(model.model, create("lora", rank=rank, alpha=2.0 * rank), _LINEARS, seed=seed)
    linear = [n for n, m in model.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    weights: dict[str, nn.Parameter] = {n: model.model.get_parameter(f"{n}.weight") for n in linear}

    def fisher(rows: list[Row], *, end: bool) -> dict[str, Tensor]:
        order = generator(seed, "fisher", len(rows)).permutation(len(rows))[:_FISHER]

        def nll(row: Row) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                logits, wanted, _ = model.logits(pairs_of([row]), end=end)
                return F.cross_entropy(logits, wanted, reduction="sum")

            return loss

        return weight_fisher(weights, [nll(rows[int(i)]) for i in order])

    forget, retain = fisher(gone, end=False), fisher(kept, end=True)
    return attach_fila(model.model, _LINEARS, forget, retain, rank=rank, alpha=2.0 * rank, seed=seed)


def unlearn_authors(
    work: Path, tofu: Path, stories: Path, split: str, method: str, rank: int, seed: int, rate: float
) -> Row:
    """Unlearn a split's authors by one method; figures before, after, and of the model trained without them."""
    torch.set_num_threads(1)
    model = _stored(work, stories, "full", seed)
    data = _load(tofu, model.tokenizer)
    gone, kept = data.gone(split), data.without(split)
    before = copy.deepcopy(model.model)
    began = time.perf_counter()
    adapters = _adapt(model, method, rank, gone, kept, seed)
    started = time.perf_counter() - began
    steps = _steps(model, Asked(before, model.tokenizer), method, adapters, gone, kept, seed=seed, rate=rate)
    seconds = time.perf_counter() - began
    if method in ("loku", "gradient_difference+fila"):
        as_lora(adapters)
    figures, ratios = _figures(model, data, gone)
    row: Row = {
        "seconds": seconds,
        "fila_seconds": started,
        "steps": steps,
        "n": len(gone),
        **_named("after", figures),
    }
    known = judged(work, tofu, stories, split, seed)
    for when, own in (("before", known["before_ratios"]), ("after", ratios)):
        quality = forget_quality(own, known["reference_ratios"])
        log = max(quality.log10_p, -300.0)
        row[f"{when}_forget_quality"] = {"p": quality.p, "log10_p": log, "d": quality.statistic}
    return {**row, **_named("before", known["before"]), **_named("reference", known["reference"])}


def judged(work: Path, tofu: Path, stories: Path, split: str, seed: int) -> Row:
    """Figures and truth ratios of the models before unlearning and without a split's authors; measured once."""
    path = work / "language" / f"judged-{split}-{seed}.json"
    if not path.exists():
        torch.set_num_threads(1)
        found: Row = {}
        for when, name in (("before", "full"), ("reference", split)):
            model = _stored(work, stories, name, seed)
            data = _load(tofu, model.tokenizer)
            found[when], found[f"{when}_ratios"] = _figures(model, data, data.gone(split))
        write_json(path, found)
    known: Row = json.loads(path.read_text())
    return known


def _figures(model: Asked, data: _Data, gone: list[Row]) -> tuple[Row, list[float]]:
    parts = _utility(model, data)
    figures = {
        **_memory(model, gone),
        "utility": _without_zeros(parts),
        "model_utility": model_utility(parts),
    }
    return {**figures, "utility_parts": parts}, _ratios(model, gone, "paraphrased_answer")


def _named(when: str, figures: Row) -> Row:
    return {f"{when}_{name}": value for name, value in figures.items()}


def _steps(
    model: Asked,
    before: Asked,
    method: str,
    adapters: AdapterSet,
    gone: list[Row],
    kept: list[Row],
    *,
    seed: int,
    rate: float,
) -> int:
    """Five epochs over the forget set, each batch beside as many retained questions; linear decay after a warm-up."""
    parameters = adapters.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    per_epoch = math.ceil(len(gone) / BATCH)
    total, step = EPOCHS * per_epoch, 0
    draws = generator(seed, "unlearn", method)
    for epoch in range(EPOCHS):
        order = generator(seed, "unlearn", epoch).permutation(len(gone))
        for start in range(0, len(gone), BATCH):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(step / per_epoch, (total - step + 1) / total)
            forget = pairs_of([gone[int(i)] for i in order[start : start + BATCH]])
            retain = pairs_of(
                [kept[int(i)] for i in draws.choice(len(kept), size=len(forget), replace=False)]
            )
            optimizer.zero_grad(set_to_none=True)
            _objective(model, before, method, forget, retain).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return step


def _objective(
    model: Asked,
    before: Asked,
    method: str,
    forget: list[tuple[str, str]],
    retain: list[tuple[str, str]],
) -> Tensor:
    if method == "kl":
        logits, _, counts = model.logits(retain, end=True)
        with torch.no_grad():
            old = before.logits(retain, end=True)[0]
        return -model.losses(forget, end=False).mean() + means(kl_divergence(logits, old), counts).mean()
    keep = 0.0 if method == "gradient_ascent" else model.losses(retain).mean()
    return _forgetting(model, before, method, forget) + keep


def _forgetting(model: Asked, before: Asked, method: str, forget: list[tuple[str, str]]) -> Tensor:
    """A method's term on the forget set."""
    refusal = [(question, REFUSAL) for question, _ in forget]
    if method == "idk":
        return model.losses(refusal).mean()
    if method in ("ihl", "loku"):
        logits, wanted, counts = model.logits(forget, end=False)
        return means(inverted_hinge(logits, wanted), counts).mean()
    losses = model.losses(forget, end=False)
    if method in ("gradient_ascent", "gradient_difference", "gradient_difference+fila"):
        return -losses.mean()
    lengths = torch.tensor([len(model.ids(*pair)[1]) - 1 for pair in forget], dtype=torch.float32)
    if method == "simnpo":
        return simnpo(losses * lengths, lengths, 4.5).mean()
    words = float(len(model.ids("", REFUSAL)[1]))
    with torch.no_grad():
        old, old_refusal = before.losses(forget, end=False) * lengths, before.losses(refusal) * words
    if method == "npo":
        return npo(losses * lengths, old, 0.1).mean()
    return dpo(model.losses(refusal) * words, old_refusal, losses * lengths, old, 0.1).mean()
