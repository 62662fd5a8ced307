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

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket
from fednano.federation.model import build_edge, connect
from fednano.runs import RunFolder
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.guard import Forgotten
from fednano.unlearning.outcome import UnlearnOutcome, UnlearnRequest
from fednano.unlearning.retrain import retrain
from fednano.unlearning.runner import unlearn
from fednano.unlearning.workspace import Workspace
from forgetting.asked import Row
from forgetting.federated_data import SETTINGS, SITES, Setting, task_of

__all__ = ["Federation", "base", "reference", "unlearned"]

LATER = 5
"""Rounds that go on afterwards."""
FLOOR = 0.01
"""Every method goes on until it has forgotten; what that costs is what is compared."""


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
    config, task = _config(of), task_of(of.data)
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
    task = task_of(of.data)
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
    task = task_of(of.data)
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
