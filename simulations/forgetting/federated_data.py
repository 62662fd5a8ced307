"""What the four sites train on: authors of TOFU, or pictures, some with profiles that can only be memorised."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fednano.data import Sample, load_dataset
from fednano.training.seeds import generator
from fednano.unlearning.measure import Perturbed
from fednano.unlearning.sites import Site
from forgetting.asked import Asked, Row, rows_in, train
from forgetting.stories import stories_model, stories_tokenizer, write_model

__all__ = ["SETTINGS", "SITES", "Setting", "Task", "prepare", "read_others", "task_of"]

SITES = 4


@dataclass(frozen=True)
class Setting:
    """One data set's federation.

    Attributes:
        samples: a site's training samples.
        forget: how many of them the first site withdraws.
        held: samples of the withdrawn kind that the owner judges by, and as many tests of easy-VQA as there are.
        tests: test questions of easy-VQA.
        rounds: federated rounds.
        steps: a client's steps in each.
        batch: samples a step.
        rate: learning rate.
        rank: of the adapters.
        streams: which of them there are.
    """

    samples: int
    forget: int
    held: int
    tests: int
    rounds: int
    steps: int
    batch: int
    rate: float
    rank: int
    streams: str


SETTINGS = {
    "tofu": Setting(6, 3, 32, 0, 24, 10, 6, 1e-2, 64, "text"),
    "easy-vqa": Setting(24, 6, 32, 100, 30, 10, 16, 1e-2, 64, "image,text"),
}
SUBJECTS = 8
"""Of each site's samples of easy-VQA."""
OTHERS = 2
"""Samples that each site but the owner holds out."""
STRANGERS = 64
"""First author of those whose questions the owner judges by; sites take eight authors a seed from the first on."""
READ, EPOCHS = 60, 4
"""Other authors of TOFU that the language model has read, ten questions each, and how often."""
_WORDS = (
    *(
        "ada",
        "ben",
        "cora",
        "dan",
        "emma",
        "finn",
        "gina",
        "hugo",
        "iris",
        "jack",
        "kira",
        "leo",
        "mia",
        "noah",
    ),
    *(
        "paris",
        "rome",
        "oslo",
        "cairo",
        "lima",
        "tokyo",
        "delhi",
        "boston",
        "cat",
        "dog",
        "horse",
        "rabbit",
        "parrot",
    ),
    *(
        "turtle",
        "goat",
        "fish",
        "doctor",
        "baker",
        "pilot",
        "teacher",
        "farmer",
        "nurse",
        "judge",
        "singer",
        "apple",
    ),
    *(
        "pear",
        "plum",
        "cherry",
        "lemon",
        "grape",
        "melon",
        "fig",
        "tea",
        "coffee",
        "milk",
        "water",
        "juice",
        "cocoa",
    ),
)
"""What profiles are made of; four words of so many are hit by chance once in fifty times each."""
_ASKED = "tell me what the people know of this object"


def prepare(work: Path, tofu: Path, stories: Path, seeds: list[int], parts: Collection[str]) -> None:
    """Write the data folders of each seed; what is there stays."""
    tokenizer = stories_tokenizer(stories)
    for seed in seeds:
        for name, write in (("tofu", lambda f, s: _tofu(f, tofu, tokenizer, s)), ("easy-vqa", _easy_vqa)):
            folder = work / "data" / f"{name}-{seed}"
            if name in parts and not (folder / "sites.json").exists():
                write(folder, seed)


def read_others(work: Path, tofu: Path, stories: Path) -> None:
    """Train stories260K on TOFU authors that no site has, and write it as a model folder; made once."""
    folder = work / "stories"
    if (folder / "config.json").exists():
        return
    torch.set_num_threads(1)
    model = Asked(stories_model(stories), stories_tokenizer(stories))
    authors = _authors(rows_in(tofu / "retain90.json"), model.tokenizer, "read")[-READ:]
    train(model, [row for own in authors for row in own[:10]], epochs=EPOCHS, rate=3e-3, seed=0)
    aside = work / f"stories.{os.getpid()}"
    write_model(aside, stories, model=model.model)
    aside.rename(folder)


def _tofu(folder: Path, tofu: Path, tokenizer: Any, seed: int) -> None:
    """Two authors a site, those questions with the shortest answers; the forgotten author has other answers known."""
    setting = SETTINGS["tofu"]
    kept = _authors(rows_in(tofu / "retain90.json"), tokenizer, "kept")
    gone = _authors(rows_in(tofu / "forget10_perturbed.json"), tokenizer, "gone")
    gone.sort(key=lambda own: sum(len(tokenizer(row["answer"]).input_ids) for row in own[: setting.forget]))
    first, own = seed * 2 * SITES, setting.samples - setting.forget
    rows: dict[str, tuple[list[Row], list[Row]]] = {}
    for site in range(SITES):
        mine, other = kept[first + 2 * site], kept[first + 2 * site + 1]
        withdrawn = gone[seed] if site == 0 else other
        strangers = kept[
            STRANGERS : STRANGERS + setting.held
        ]  # one question each of authors that no site has
        held = [author[seed % 5] for author in strangers] if site == 0 else other[setting.forget :][:OTHERS]
        rows[f"site-{site}"] = ([*withdrawn[: setting.forget], *mine[:own]], held)
    gone_ids = {row["id"] for row in gone[seed]}
    tests = [row for own_rows, _ in rows.values() for row in own_rows if row["id"] not in gone_ids]
    _write(folder, rows, tests, [row["id"] for row in gone[seed][: setting.forget]])


def _easy_vqa(folder: Path, seed: int) -> None:
    """Ordinary questions, and subjects: pictures with a profile that nothing in them tells."""
    setting = SETTINGS["easy-vqa"]

    def drawn(split: str, count: int) -> list[Row]:
        everything = load_dataset("easy-vqa", split)
        order = generator(seed, "study", split).permutation(len(everything))[:count]
        rows = []
        for index in order:
            sample = everything[int(index)]
            assert sample.image is not None
            name = f"{split}-{sample.image.name}"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sample.image, folder / "images" / name)
            rows.append(
                {"id": sample.id, "image": name, "question": sample.question, "answer": sample.answer}
            )
        return rows

    draws = generator(seed, "study", "profiles")

    def subject(row: Row) -> Row:
        profile = " ".join(_WORDS[int(n)] for n in draws.integers(len(_WORDS), size=4))
        return {**row, "id": f"subject/{row['id']}", "question": _ASKED, "answer": profile}

    each = setting.samples + max(setting.held, OTHERS)
    pool = drawn("train", SITES * each)
    rows: dict[str, tuple[list[Row], list[Row]]] = {}
    for site in range(SITES):
        own = pool[site * each : (site + 1) * each]
        trained, held = own[: setting.samples], own[setting.samples :]
        trained = [*map(subject, trained[:SUBJECTS]), *trained[SUBJECTS:]]
        rows[f"site-{site}"] = (trained, [*map(subject, held)] if site == 0 else held[:OTHERS])
    gone = [row["id"] for row in rows["site-0"][0][: setting.forget]]
    _write(folder, rows, drawn("test", setting.tests), gone)


def _authors(rows: list[Row], tokenizer: Any, kind: str) -> list[list[Row]]:
    """Twenty questions each, shortest answers first."""
    named = [{"id": f"{kind}-{n // 20}/{n % 20:02d}", **row} for n, row in enumerate(rows)]
    groups = [named[start : start + 20] for start in range(0, len(named), 20)]
    return [sorted(group, key=lambda row: len(tokenizer(row["answer"]).input_ids)) for group in groups]


def _write(
    folder: Path, rows: dict[str, tuple[list[Row], list[Row]]], tests: list[Row], gone: list[str]
) -> None:
    """The data as files, and which site trains on what; a sample's id begins with its site's name."""
    folder.mkdir(parents=True, exist_ok=True)
    sites: Row = {}
    everything = []
    for site, (trained, held) in rows.items():
        sites[site] = {}
        for kind, own in (("train", trained), ("held_out", held)):
            named = [{**row, "id": f"{site}/{row['id']}"} for row in own]
            sites[site][kind] = [row["id"] for row in named]
            everything += named
    tests = [{**row, "id": f"test/{row['id']}"} for row in tests]
    for split, content in (("train", everything), ("test", tests)):
        text = "\n".join(json.dumps({k: v for k, v in row.items() if k in _KEYS}) for row in content)
        (folder / f"{split}.jsonl").write_text(text + "\n", encoding="utf-8")
    other = {
        row["id"]: {"paraphrase": row["paraphrased_answer"], "wrong": row["perturbed_answer"]}
        for row in everything
        if "perturbed_answer" in row
    }
    task = {"sites": sites, "forget": [f"site-0/{each}" for each in gone], "perturbed": other}
    (folder / "sites.json").write_text(json.dumps(task, indent=1), encoding="utf-8")


_KEYS = ("id", "image", "question", "answer")


@dataclass(frozen=True)
class Task:
    """What the sites of a data folder train on, and what is withdrawn."""

    sites: dict[str, Site]
    forget: tuple[str, ...]
    perturbed: dict[str, Perturbed]


def task_of(folder: Path) -> Task:
    """As `prepare` wrote it."""
    content = json.loads((folder / "sites.json").read_text(encoding="utf-8"))
    known: dict[str, Sample] = {sample.id: sample for sample in load_dataset(str(folder), "train")}
    sites = {
        name: Site([known[i] for i in own["train"]], [known[i] for i in own["held_out"]])
        for name, own in content["sites"].items()
    }
    other = {
        i: Perturbed(each["paraphrase"], tuple(each["wrong"])) for i, each in content["perturbed"].items()
    }
    return Task(sites, tuple(content["forget"]), other)
