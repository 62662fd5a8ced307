"""A small real data set (a slice of easy-VQA as a folder) and runs over it, shared by the federation tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from fednano.data import load_easy_vqa
from fednano.federation.apps import client_app
from fednano.federation.baselines import build_rule, check_rule
from fednano.federation.config import RunConfig
from fednano.federation.evaluator import Evaluator
from fednano.federation.exchange import Stop
from fednano.federation.inprocess import InProcessGrid
from fednano.federation.messages import HostTicket
from fednano.federation.model import build_edge, client_name, settled
from fednano.federation.rounds import MAIN_PHASE, Federation, PhaseResult, run_rounds
from fednano.federation.simulation import simulate
from fednano.federation.specification import spec_of
from fednano.federation.worker import Worker
from fednano.runs import RunFolder, make_view


@pytest.fixture(scope="session")
def small_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-vqa")
    (folder / "images").mkdir()
    for split, count in (("train", 160), ("test", 24)):
        rows = []
        for sample in list(load_easy_vqa(split))[:count]:
            assert sample.image is not None
            name = f"{split}-{sample.image.name}"
            shutil.copyfile(sample.image, folder / "images" / name)
            rows.append({"image": name, "question": sample.question, "answer": sample.answer})
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def features_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def settings(small_vqa: Path, features_dir: Path, runs_dir: Path) -> dict[str, Any]:
    """A run of seconds: whole path, little data."""
    return {
        "dataset": str(small_vqa),
        "clients": 3,
        "alpha": 5.0,
        "rounds": 2,
        "samples": 24,
        "batch_size": 8,
        "rank": 4,
        "fisher_samples": 8,
        "holdout": 0.1,
        "evaluate_every": 0,
        "placement": "local",
        "runs_dir": str(runs_dir),
        "cache_dir": str(features_dir),
    }


Run = Callable[..., Path]


@pytest.fixture
def run(settings: dict[str, Any]) -> Run:
    def start(**changes: Any) -> Path:
        return simulate(RunConfig(**(settings | changes)), backend="inprocess", view=make_view("quiet"))

    return start


class Laboratory:
    """Rounds without the rest of a run: the real clients, one loaded model, no evaluation on the server."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.config = RunConfig(**settings)
        self.edge = build_edge(self.config)
        self.start = self.edge.travelling()
        self.grid = InProcessGrid(client_app, self.config.clients)

    def federation(self, grid: InProcessGrid | None = None, **changes: Any) -> Federation:
        """A federation of its own, with its own folder."""
        config = settled(RunConfig(**(self.settings | changes)))
        return Federation(
            grid=grid or self.grid,
            nodes={client_name(n): n + 1 for n in range(config.clients)},
            config=config,
            ticket=HostTicket(),
            spec=spec_of(self.edge, config),
            folder=RunFolder.create(config.runs_dir, "laboratory", config.to_mapping()),
            view=make_view("quiet"),
            stop=Stop(),
            evaluator=cast("Evaluator", None),
            simulated=True,
            edge=self.edge.edge.fingerprint,
            seeded=self.start,
            nano=self.edge,
        )

    def rounds(
        self,
        rule: str = "fedavg",
        *,
        fed: Federation | None = None,
        upto: PhaseResult | None = None,
        **changes: Any,
    ) -> PhaseResult:
        """Run the rounds of a rule from the start, or from where ``upto`` ended."""
        fed = fed or self.federation(rule=rule, **changes)
        made = build_rule(fed.config, rule)
        check_rule(made, fed.spec, fed.config)
        return run_rounds(fed, MAIN_PHASE, made, upto or PhaseResult(self.start))


@pytest.fixture(scope="session")
def laboratory(
    small_vqa: Path, features_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Laboratory]:
    made = Laboratory(
        {
            "dataset": str(small_vqa),
            "clients": 3,
            "alpha": 5.0,
            "rounds": 2,
            "samples": 4,
            "batch_size": 4,
            "rank": 4,
            "fisher_samples": 4,
            "holdout": 0.1,
            "evaluate_every": 0,
            "placement": "local",
            "runs_dir": str(tmp_path_factory.mktemp("laboratory")),
            "cache_dir": str(features_dir),
        }
    )
    yield made
    made.grid.close()
    Worker.close_current()
