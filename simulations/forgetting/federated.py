"""Four sites tune together, one withdraws samples: every method against an adapter that was trained without them.

Two data sets: authors of TOFU, answered by stories260K behind a text adapter, and easy-VQA, answered by the embedded
model. Sites are small and train long, so that they memorise: where nothing is memorised, nothing can be forgotten.

- ``tofu``: the frozen language model has first read other authors of TOFU, so that it knows how such answers are
  worded and none of the facts. One author is withdrawn. Utility: the answer probability on all retained questions.
- ``easy-vqa``: beside ordinary questions, which the model answers by what it sees, each site has subjects: pictures
  with a made-up profile of four words, which can only be memorised. Some subjects are withdrawn. Utility:
  test questions of easy-VQA.

Samples that nobody trains on, of the withdrawn kind, are the level that the stop rule asks for.
The rounds are those of a run (`fednano.unlearning.retrain` repeats them bit for bit), the unlearning is the job's own
runner, and afterwards training goes on without the samples for five more rounds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fednano.data import Sample, load_dataset
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.federation.model import build_edge, connect
from fednano.runs import RunFolder
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.guard import Forgotten
from fednano.training.seeds import generator
from fednano.unlearning.measure import Perturbed
from fednano.unlearning.outcome import UnlearnOutcome, UnlearnRequest
from fednano.unlearning.retrain import retrain
from fednano.unlearning.runner import unlearn
from fednano.unlearning.sites import Site
from fednano.unlearning.workspace import Workspace
from forgetting.language import Asked, train
from forgetting.stories import stories_model, stories_tokenizer, write_model

__all__ = ["SETTINGS", "Federation", "Setting", "base", "prepare", "read_others", "reference", "unlearned"]

SITES = 4
LATER = 5
"""Rounds that go on afterwards."""
FLOOR = 0.01
"""Every method goes on until it has forgotten; what that costs is what is compared."""

Row = dict[str, Any]


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


@dataclass(frozen=True)
class Federation:
    """One run that is tuned and then unlearnt from.

    Attributes:
        work: folder for data, models, runs.
        name: data set, a key of `SETTINGS`.
        seed: its seed.
        rounds: of tuning; 0: those of the setting.
    """

    work: Path
    name: str
    seed: int
    rounds: int = 0

    @property
    def setting(self) -> Setting:
        """Of its data set."""
        return SETTINGS[self.name]

    @property
    def data(self) -> Path:
        """Its data folder."""
        return self.work / "data" / f"{self.name}-{self.seed}"

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.work / "runs" / f"{self.name}-{self.seed}"


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
    authors = _authors(_lines(tofu / "retain90.json"), model.tokenizer, "read")[-READ:]
    train(model, [row for own in authors for row in own[:10]], epochs=EPOCHS, rate=3e-3, seed=0)
    aside = work / f"stories.{os.getpid()}"
    write_model(aside, stories, model=model.model)
    aside.rename(folder)


def _tofu(folder: Path, tofu: Path, tokenizer: Any, seed: int) -> None:
    """Two authors a site, those questions with the shortest answers; the forgotten author has other answers known."""
    setting = SETTINGS["tofu"]
    kept = _authors(_lines(tofu / "retain90.json"), tokenizer, "kept")
    gone = _authors(_lines(tofu / "forget10_perturbed.json"), tokenizer, "gone")
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


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
class _Task:
    sites: dict[str, Site]
    forget: tuple[str, ...]
    perturbed: dict[str, Perturbed]


def _task(folder: Path) -> _Task:
    content = json.loads((folder / "sites.json").read_text(encoding="utf-8"))
    known: dict[str, Sample] = {sample.id: sample for sample in load_dataset(str(folder), "train")}
    sites = {
        name: Site([known[i] for i in own["train"]], [known[i] for i in own["held_out"]])
        for name, own in content["sites"].items()
    }
    other = {
        i: Perturbed(each["paraphrase"], tuple(each["wrong"])) for i, each in content["perturbed"].items()
    }
    return _Task(sites, tuple(content["forget"]), other)


def _config(of: Federation) -> RunConfig:
    setting, work, name, seed = of.setting, of.work, of.name, of.seed
    return RunConfig(
        model=str(work / "stories") if name == "tofu" else "tiny",
        dataset=str(of.data),
        clients=SITES,
        rounds=of.rounds or setting.rounds,
        samples=setting.steps * setting.batch,
        batch_size=setting.batch,
        learning_rate=setting.rate,
        rank=setting.rank,
        streams=setting.streams,
        placement="local",
        seed=seed,
        runs_dir=str(work / "runs"),
        cache_dir=str(work / "cache" / f"{name}-{seed}"),
    )


def base(of: Federation) -> Path:
    """The tuned run, as a run folder; made once."""
    path = of.run
    if (path / "adapter.json").exists():
        return path
    torch.set_num_threads(1)
    shutil.rmtree(path, ignore_errors=True)
    config, task = _config(of), _task(of.data)
    path.mkdir(parents=True)
    run = RunFolder(path)
    run.write_json("config.json", config.to_mapping())
    run.write_json(
        "partition.json", {"kind": "sites", "samples": {n: len(s.train) for n, s in task.sites.items()}}
    )
    edge = build_edge(config)
    with connect(config, HostTicket()) as llm:
        features = FeatureCache(edge.edge, Path(config.cache_dir))
        data = {site: ClientData(own.train, edge, features) for site, own in task.sites.items()}
        for done in retrain(config, edge, llm, data, {}, (0, edge.travelling(), {}), stop=lambda: False):
            for site in task.sites:
                row = {"phase": "federated", "round": done.round, "scope": "client", "client": site}
                run.append_metrics({**row, "loss": done.loss, "samples": config.samples})
        language = llm.part.fingerprint  # type: ignore[attr-defined]
    run.save_adapter(done.leaves, {"edge": edge.edge.fingerprint, "language": language})
    run.close()
    return path


def _unlearn(of: Federation, plan: Mapping[str, Any]) -> UnlearnOutcome:
    torch.set_num_threads(1)
    task = _task(of.data)
    request = UnlearnRequest(
        run=base(of),
        client="site-0",
        samples=task.forget,
        seed=of.seed,
        utility_floor=FLOOR,
        runs_dir=of.work / "runs",
        batch_size=of.setting.batch,
        **plan,
    )
    return unlearn(request, sites=task.sites, perturbed=task.perturbed)


def _later(
    of: Federation, leaves: Mapping[str, torch.Tensor], *, level: float | None = None, name: str = "later"
) -> Row:
    """Forget-set scores after further rounds without the samples; with a ``level``, under the guard of the owner."""
    task = _task(of.data)
    with Workspace(of.run, "site-0", task.forget, sites=task.sites, runs_dir=of.run.parent) as space:
        config = space.config.changed(rounds=space.config.rounds + LATER)
        data = {site: space.data(own) for site, own in space.scope.retain.items()}
        nothing: dict[str, torch.Tensor] = {}
        start = (space.config.rounds, dict(leaves), nothing)
        held = {} if level is None else {"site-0": [Forgotten(space.data(space.scope.forget), level)]}
        rounds = retrain(config, space.edge, space.llm, data, {}, start, stop=lambda: False, forgotten=held)
        probes = [space.probe(done.leaves) for done in rounds]
    probe = probes[-1]
    return {
        f"{name}_exact_memorisation": probe.forget.exact_memorisation,
        f"{name}_extraction_strength": probe.forget.extraction_strength,
        f"{name}_utility": probe.utility,
        f"{name}_by_round": [each.forget.exact_memorisation for each in probes],
    }


def reference(of: Federation) -> Row:
    """Retrain without the samples; its figures, and the same after further rounds."""
    outcome = _unlearn(of, {"method": "retrain"})
    return {**_figures(outcome), **_later(of, outcome.leaves)}


def unlearned(of: Federation, plan: Mapping[str, Any], *, later: bool) -> Row:
    """Unlearn by one method, and train on: as a run does, with the guard at the owner, and without it."""
    outcome = _unlearn(of, plan)
    if not later:
        return _figures(outcome)
    assert outcome.after is not None
    level = max(outcome.after.forget.exact_memorisation, outcome.after.unseen.exact_memorisation)
    return {
        **_figures(outcome),
        **_later(of, outcome.leaves, level=level),
        **_later(of, outcome.leaves, name="unguarded"),
    }


def _figures(outcome: UnlearnOutcome) -> Row:
    before, after = outcome.before, outcome.after
    assert before is not None
    assert after is not None
    assert before.retain is not None
    assert after.retain is not None
    row: Row = {
        "status": outcome.status,
        "rounds": len(outcome.records),
        "client_seconds": outcome.client_seconds,
        "seconds": outcome.seconds,
        "unseen_ma": outcome.thresholds["ma"],
        "utility_ratio": after.utility / before.utility,
        "retained_ratio": after.retain.probability / before.retain.probability,
        "worst_client": min(after.clients[name] - before.clients[name] for name in before.clients),
        "min_k_auc": after.attacks["min_k"].value,
    }
    for when, each in (("before", before), ("after", after)):
        assert each.retain is not None
        row |= {
            f"{when}_exact_memorisation": each.forget.exact_memorisation,
            f"{when}_extraction_strength": each.forget.extraction_strength,
            f"{when}_probability": each.forget.probability,
            f"{when}_rouge_l": each.forget.rouge_l,
            f"{when}_el": each.forget.el,
            f"{when}_retain_probability": each.retain.probability,
            f"{when}_retain_exact_memorisation": each.retain.exact_memorisation,
            f"{when}_unseen_exact_memorisation": each.unseen.exact_memorisation,
            f"{when}_utility": each.utility,
            f"{when}_accuracy": each.accuracy,
        }
        ratios = each.forget.truth_ratios
        row[f"{when}_truth_ratios"] = list(ratios)
        row[f"{when}_truth_ratio"] = fmean(min(r, 1 / r) for r in ratios) if ratios else None
    return row
