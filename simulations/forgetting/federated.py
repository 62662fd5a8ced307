"""Four sites tune together, one withdraws samples: every method against an adapter that was trained without them.

Two data sets: authors of TOFU, answered by stories260K behind a text adapter, and easy-VQA, answered by the embedded
model. Sites are small and train long, so that they memorise: where nothing is memorised, nothing can be forgotten.
The rounds are those of a run (`fednano.unlearning.retrain` repeats them bit for bit), the unlearning is the job's own
runner, and afterwards training goes on without the samples for five more rounds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
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
from fednano.unlearning.measure import Perturbed
from fednano.unlearning.outcome import UnlearnOutcome, UnlearnRequest
from fednano.unlearning.retrain import retrain
from fednano.unlearning.runner import unlearn
from fednano.unlearning.sites import Site
from fednano.unlearning.workspace import Workspace
from forgetting.stories import stories_tokenizer, write_model

__all__ = ["SETTINGS", "Setting", "base", "prepare", "reference", "unlearned"]

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
        held: samples that a site judges by.
        tests: questions that nobody trains on.
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
    "tofu": Setting(12, 6, 2, 8, 8, 30, 8, 1e-2, 64, "text"),
    "easy-vqa": Setting(48, 20, 8, 100, 8, 20, 16, 1e-2, 16, "image,text"),
}


def prepare(work: Path, tofu: Path, stories: Path, seeds: list[int]) -> None:
    """Write the model folder and, for each seed, both data folders; what is there stays."""
    if not (work / "stories" / "config.json").exists():
        write_model(work / "stories", stories)
    tokenizer = stories_tokenizer(stories)
    for seed in seeds:
        for name, write in (("tofu", lambda f, s: _tofu(f, tofu, tokenizer, s)), ("easy-vqa", _easy_vqa)):
            folder = work / "data" / f"{name}-{seed}"
            if not (folder / "sites.json").exists():
                write(folder, seed)


def _tofu(folder: Path, tofu: Path, tokenizer: Any, seed: int) -> None:
    """Two authors a site, those questions with the shortest answers; the forgotten author has other answers known."""
    setting = SETTINGS["tofu"]
    kept = _authors(_lines(tofu / "retain90.json"), tokenizer, "kept")
    gone = _authors(_lines(tofu / "forget10_perturbed.json"), tokenizer, "gone")
    per_author = setting.samples - setting.forget
    rows: dict[str, list[Row]] = {}
    first = seed * 16
    for site in range(SITES):
        own, other = kept[first + 2 * site], kept[first + 2 * site + 1]
        withdrawn = gone[seed] if site == 0 else other
        rows[f"site-{site}"] = [
            *own[:per_author],
            *withdrawn[: setting.forget],
            *own[per_author:][: setting.held],
        ]
    rest = kept[first + 2 * SITES : first + 16]
    tests = [row for author in rest for row in author][: setting.tests]
    _write(folder, "tofu", rows, tests, [row["id"] for row in gone[seed][: setting.forget]])


def _easy_vqa(folder: Path, seed: int) -> None:
    setting = SETTINGS["easy-vqa"]
    from fednano.training.seeds import generator

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

    each = setting.samples + setting.held
    train = drawn("train", SITES * each)
    rows = {f"site-{site}": train[site * each : (site + 1) * each] for site in range(SITES)}
    gone = [row["id"] for row in rows["site-0"][: setting.forget]]
    _write(folder, "easy-vqa", rows, drawn("test", setting.tests), gone)


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _authors(rows: list[Row], tokenizer: Any, kind: str) -> list[list[Row]]:
    """Twenty questions each, shortest answers first."""
    named = [{"id": f"{kind}-{n // 20}/{n % 20:02d}", **row} for n, row in enumerate(rows)]
    groups = [named[start : start + 20] for start in range(0, len(named), 20)]
    return [sorted(group, key=lambda row: len(tokenizer(row["answer"]).input_ids)) for group in groups]


def _write(folder: Path, name: str, rows: dict[str, list[Row]], tests: list[Row], gone: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held = SETTINGS[name].held
    named = {site: [{**row, "id": f"{site}/{row['id']}"} for row in own] for site, own in rows.items()}
    everything = [row for own in named.values() for row in own]
    tests = [{**row, "id": f"test/{row['id']}"} for row in tests]
    for split, content in (("train", everything), ("test", tests)):
        text = "\n".join(json.dumps({k: v for k, v in row.items() if k in _KEYS}) for row in content)
        (folder / f"{split}.jsonl").write_text(text + "\n", encoding="utf-8")
    other = {
        row["id"]: {"paraphrase": row["paraphrased_answer"], "wrong": row["perturbed_answer"]}
        for row in everything
        if "perturbed_answer" in row
    }
    sites = {
        site: {"train": [row["id"] for row in own[:-held]], "held_out": [row["id"] for row in own[-held:]]}
        for site, own in named.items()
    }
    forget = [f"site-0/{each}" for each in gone]
    task = {"sites": sites, "forget": forget, "perturbed": other}
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


def _config(work: Path, name: str, seed: int) -> RunConfig:
    setting = SETTINGS[name]
    return RunConfig(
        model=str(work / "stories") if name == "tofu" else "tiny",
        dataset=str(work / "data" / f"{name}-{seed}"),
        clients=SITES,
        rounds=setting.rounds,
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


def base(work: Path, name: str, seed: int) -> Path:
    """The tuned run, as a run folder; made once."""
    path = work / "runs" / f"{name}-{seed}"
    if (path / "adapter.json").exists():
        return path
    torch.set_num_threads(1)
    shutil.rmtree(path, ignore_errors=True)
    config, task = _config(work, name, seed), _task(work / "data" / f"{name}-{seed}")
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


def _unlearn(work: Path, name: str, seed: int, plan: Mapping[str, Any]) -> UnlearnOutcome:
    torch.set_num_threads(1)
    task = _task(work / "data" / f"{name}-{seed}")
    request = UnlearnRequest(
        run=base(work, name, seed),
        client="site-0",
        samples=task.forget,
        seed=seed,
        utility_floor=FLOOR,
        runs_dir=work / "runs",
        batch_size=SETTINGS[name].batch,
        **plan,
    )
    return unlearn(request, sites=task.sites, perturbed=task.perturbed)


def _later(work: Path, name: str, seed: int, leaves: Mapping[str, torch.Tensor]) -> Row:
    """Forget-set scores after further rounds without the samples."""
    task = _task(work / "data" / f"{name}-{seed}")
    run = RunFolder(work / "runs" / f"{name}-{seed}")
    with Workspace(run.path, "site-0", task.forget, sites=task.sites, runs_dir=work / "runs") as space:
        config = space.config.changed(rounds=space.config.rounds + LATER)
        data = {site: space.data(own) for site, own in space.scope.retain.items()}
        nothing: dict[str, torch.Tensor] = {}
        start = (space.config.rounds, dict(leaves), nothing)
        *_, last = retrain(config, space.edge, space.llm, data, {}, start, stop=lambda: False)
        probe = space.probe(last.leaves)
    return {
        "later_exact_memorisation": probe.forget.exact_memorisation,
        "later_extraction_strength": probe.forget.extraction_strength,
        "later_utility": probe.utility,
    }


def reference(work: Path, name: str, seed: int) -> Row:
    """Retrain without the samples; its figures, and the same after further rounds."""
    outcome = _unlearn(work, name, seed, {"method": "retrain"})
    return {**_figures(outcome), **_later(work, name, seed, outcome.leaves)}


def unlearned(work: Path, name: str, seed: int, plan: Mapping[str, Any], *, later: bool) -> Row:
    """Unlearn by one method, and train on."""
    outcome = _unlearn(work, name, seed, plan)
    return {**_figures(outcome), **(_later(work, name, seed, outcome.leaves) if later else {})}


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
