"""A finished run without a model: what the job machinery sees of one, and a runner that pretends to unlearn."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fednano.data import Sample
from fednano.runs import RunFolder
from fednano.runs.atomic import write_bytes
from fednano.security.canonical import sha256_hex
from fednano.security.keys import Signer, create_key
from fednano.unlearning.jobs.desk import Desk
from fednano.unlearning.jobs.holdings import Holding, choose
from fednano.unlearning.jobs.job import Job
from fednano.unlearning.jobs.place import Place
from fednano.unlearning.jobs.request import Plan, sign_request
from fednano.unlearning.jobs.runner import Result, Round, Task
from fednano.unlearning.jobs.states import State
from fednano.unlearning.jobs.work import work

SITES = ("client-000", "client-001")


def tensors(value: float) -> bytes:
    """A safetensors file with one tensor, made by hand: the machinery needs no torch, so its tests do not either."""
    header = json.dumps({"image.A": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<2f", value, -value)


def samples(site: str, count: int = 40) -> list[Sample]:
    return [
        Sample(f"toy/{site}/subject-{n % 4}/{n:03d}", None, f"question {n}", ("red", "blue")[n % 2])
        for n in range(count)
    ]


@dataclass
class FakeHoldings:
    """Every site holds 40 samples; the last four are held out, and of the rest all but the last four were drawn."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SITES, 36))
    problem: str = ""
    absent: set[str] = field(default_factory=set)

    def sites(self) -> dict[str, int]:
        return self.counts

    def holding(self, site: str) -> Holding | None:
        if site in self.absent:
            return None
        own = samples(site)
        return Holding(own[:36], own[36:], {sample.id: 1 + n // 16 for n, sample in enumerate(own[:32])})

    def base_model(self) -> str:
        return self.problem


@dataclass
class FakeRunner:
    """Returns another adapter; ``during`` is called in each round."""

    result: dict[str, Any] = field(default_factory=dict)
    during: Callable[[Task], None] = lambda task: None
    tasks: list[Task] = field(default_factory=list)

    def __call__(self, task: Task, *, progress: Callable[[Round], None], stop: Callable[[], bool]) -> Result:
        self.tasks.append(task)
        for number in (1, 2):
            progress(Round(number, 2, ihl=1.0 / number, retain_loss=0.5, el=0.1, ma=None))
            self.during(task)
            if stop():
                break
        figures = {"loss": 0.25, "auc": float("nan"), "rouge": None}
        made = {
            "payload": tensors(2.0 + len(task.samples)),
            "before": figures,
            "after": {**figures, "loss": 2.5},
            "seconds": 1.5,
            "bytes": 1000,
            "rounds": 2,
            "stopped": "forgotten",
            "approximations": ("fisher from the owner alone",),
        }
        return Result(**{**made, **self.result})


class World:
    """A run, its sites' keys, two approvers, and a desk."""

    def __init__(self, folder: Path, *, fresh: bool = True) -> None:
        self.folder = folder
        self.run = folder / "runs" / "toy"
        self.holdings = FakeHoldings()
        if fresh:
            self._build()
        self.place = Place(RunFolder(self.run))
        self.desk = Desk(self.place, lambda: self.holdings)
        self.keys = {}
        if fresh:
            names = (*SITES, "ann", "ben")
            self.keys = {name: create_key(folder / "keys", name) for name in names}
            registry = self.place.registry
            for site in SITES:
                key = self.keys[site]
                registry = registry.with_site(site, key.public, key.salt, known=list(SITES))
            for name in ("ann", "ben"):
                registry = registry.with_approver(name, self.keys[name].public)
            registry.save()

    def _build(self) -> None:
        run = RunFolder(self.run)
        self.run.mkdir(parents=True)
        run.write_json("config.json", {"cache-dir": ""})
        run.write_json("partition.json", {"kind": "dirichlet", "samples": dict.fromkeys(SITES, 36)})
        self.write_adapter(1.0)
        for number in (1, 2, 3):
            folder = self.run / "checkpoints" / f"round-{number:04d}"
            write_bytes(folder / "adapter.safetensors", tensors(number / 10))
            run.write_json(f"checkpoints/{folder.name}/state.json", {"round": number, "state": {}})

    def write_adapter(self, value: float) -> None:
        payload = tensors(value)
        write_bytes(self.run / "adapter.safetensors", payload)
        info = {"edge": "e" * 64, "language": "", "spec": "s", "sha256": sha256_hex(payload)}
        RunFolder(self.run).write_json("adapter.json", info)

    @property
    def server(self) -> Signer:
        return self.place.server_key()

    def ids(self, site: str = SITES[0], count: int = 3, start: int = 0) -> list[str]:
        return [sample.id for sample in samples(site)][start : start + count]

    def request(
        self, site: str = SITES[0], kind: str = "samples", name: str = "", **changes: Any
    ) -> dict[str, Any]:
        holding = FakeHoldings().holding(changes.pop("of", site))
        assert holding is not None
        ids = changes.pop("ids", None) or self.ids(site)
        chosen = ids if kind == "samples" else choose(holding, kind, name)
        values = {"run": "toy", "plan": Plan(), "reason": "Art. 17", **changes}
        return sign_request(self.keys[site], kind=kind, name=name, ids=chosen, **values)

    def adapter(self) -> bytes:
        return self.place.adapter()[1]


def submit(world: World, **request: Any) -> Job:
    """A job of this request, as it stands after submission."""
    return world.desk.submit(world.request(**request), actor="test")[0]


def committed(world: World, **request: Any) -> Job:
    """A job of this request that was worked on and committed."""
    job = submit(world, **request)
    assert job.state is State.QUEUED, job.note
    work(world.desk, FakeRunner(), world.server)
    job = world.desk.store.job(job.id)
    assert job.state is State.COMMITTED, job.note
    return job
