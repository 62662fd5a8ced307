"""Unlearning methods compared with retraining, in a federation and in the setting of LoKU's paper in small.

    python simulations/unlearning.py --tofu DATA/tofu --stories DATA/stories260k --work WORK --jobs 32
    python simulations/unlearning.py --tofu DATA/tofu --stories DATA/stories260k --small

Parts ``tofu`` and ``easy-vqa``: four sites tune, one withdraws samples (`forgetting.federated`). Part ``language``: one
language model memorises TOFU authors and unlearns some (`forgetting.language`).

Files that are needed: of TOFU (MIT) ``retain90.json``, ``forget10_perturbed.json``, ``retain_perturbed.json``,
``real_authors_perturbed.json`` and ``world_facts_perturbed.json`` in ``--tofu``; of stories260K (llama2.c, MIT)
``stories260K.bin`` and ``tok512.bin`` in ``--stories``. easy-VQA comes from its package. Nothing is downloaded.

Each cell is measured by one thread, ``--jobs`` of them at a time, and kept as a file under ``--work``: a study that was
cut off goes on where it was. The results file is written anew as cells end, so it is valid at any time; gates stand in
it once all their cells do. Every method is tuned in the same way, on a seed of its own that the results leave out: of
the learning rates (and, for FILA in the federation, ranks), the one that forgets and keeps most.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fednano.runs.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "simulations"))

from forgetting.schedule import carry_out  # noqa: E402
from forgetting.verdict import Row, choose, compare, draw, gates, overall  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "unlearning.json"
FEDERATED = (*("loku", "ihl", "gradient_ascent", "gradient_difference", "kl", "npo", "simnpo", "dpo", "idk"),)
_RATES = (1e-2, 1.7e-2, 3e-2, 3e-3)
RATES = {"tofu": _RATES, "easy-vqa": _RATES, "language": (1e-3, 3e-3, 1e-2)}
"""Learning rates that are tried."""
FILA_RANKS = {"tofu": (16, 64), "easy-vqa": (16, 64)}
EVERY = 15.0
"""Seconds between two writings of the results."""
TUNING = 3
"""The seed that methods are tuned on."""


@dataclass(frozen=True)
class Study:
    """What is measured, and where.

    Attributes:
        work: kept cells, models, runs.
        tofu: TOFU's files.
        stories: those of stories260K.
        parts: ``"tofu"``, ``"easy-vqa"``, ``"language"``.
        seeds: of the results.
        epochs: in which the language model memorises.
        rounds: most rounds of unlearning in the federation.
        steps: steps of each site in such a round.
        methods: in the federation; ``None``: all.
        rates: most learning rates that are tried.
        ranks: of LoRA, in the paper's setting; those but 16 with the first seed only.
        splits: of TOFU, in the paper's setting.
        tuning: rounds of tuning in the federation; 0: those of its setting.
    """

    work: Path
    tofu: Path
    stories: Path
    parts: tuple[str, ...] = ("tofu", "easy-vqa", "language")
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 14
    rounds: int = 20
    steps: int = 1
    methods: tuple[str, ...] = FEDERATED
    rates: int = 4
    ranks: tuple[int, ...] = (4, 8, 16, 32)
    splits: tuple[str, ...] = ("01", "05", "10")
    tuning: int = 0


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: which function makes it.
        part: data set of a federation, or ``"language"``.
        seed: its seed.
        options: what else it is given.
    """

    kind: str
    part: str
    seed: int
    options: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def name(self) -> str:
        """For people, and for its file."""
        return "-".join(
            [
                self.kind,
                self.part,
                str(self.seed),
                *(f"{value:g}" if isinstance(value, float) else str(value) for _, value in self.options),
            ]
        )

    @property
    def urgency(self) -> float:
        """What others wait for comes first, then what takes longest."""
        own = dict(self.options)
        order = {"read": 9, "base": 8, "memorise": 7, "judged": 6, "reference": 5}
        if self.kind in order:
            return order[self.kind] + (0.5 if self.seed == TUNING else 0.0)
        first = 4.0 if self.seed == TUNING else -self.seed / 1000
        return first + (2.0 if self.kind == "federated" else 1.0 + float(own["split"]) / 100)

    @property
    def needs(self) -> tuple[Cell, ...]:
        """Cells that it reads the files of."""
        own = dict(self.options)
        if self.kind == "base":
            return (cell("read", "tofu", 0),) if self.part == "tofu" else ()
        if self.kind in ("reference", "federated"):
            return (cell("base", self.part, self.seed),)
        if self.kind == "judged":
            return tuple(cell("memorise", "language", self.seed, split=s) for s in ("full", own["split"]))
        if self.kind == "language":
            return (cell("judged", "language", self.seed, split=own["split"]),)
        return ()


def cell(kind: str, part: str, seed: int, **options: Any) -> Cell:
    """A `Cell` by keywords."""
    return Cell(kind, part, seed, tuple(options.items()))


def measure(study: Study, each: Cell) -> Row:
    """Measure a cell, or read what was measured of it."""
    mark = hashlib.sha256(
        repr((each, study.epochs, study.rounds, study.steps, study.tuning)).encode()
    ).hexdigest()[:8]
    path = study.work / "cells" / f"{each.name}-{mark}.json"
    if not path.exists():
        began, used = time.perf_counter(), time.process_time()
        row = _KINDS[each.kind](study, each.part, each.seed, **dict(each.options))
        head = {"part": each.part, "kind": each.kind, "seed": each.seed, **dict(each.options)}
        write_json(
            path,
            {
                **head,
                **row,
                "cell_seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - used,
            },
        )
    found: Row = json.loads(path.read_text())
    return found


def _read(study: Study, part: str, seed: int) -> Row:
    from forgetting.federated_data import read_others

    read_others(study.work, study.tofu, study.stories)
    return {}


def _base(study: Study, part: str, seed: int) -> Row:
    from forgetting.federated import Federation, base

    base(Federation(study.work, part, seed, study.tuning))
    return {}


def _reference(study: Study, part: str, seed: int) -> Row:
    from forgetting.federated import Federation, reference

    return reference(Federation(study.work, part, seed, study.tuning))


def _federated(study: Study, part: str, seed: int, method: str, rate: float, rank: int, later: bool) -> Row:
    from forgetting.federated import Federation, unlearned

    plan = {
        "method": method,
        "rank": rank,
        "learning_rate": rate,
        "rounds": study.rounds,
        "steps": study.steps,
    }
    return unlearned(Federation(study.work, part, seed, study.tuning), plan, later=later)


def _memorise(study: Study, part: str, seed: int, split: str) -> Row:
    from forgetting.language import memorise

    seconds = memorise(study.work, study.tofu, study.stories, split, seed, epochs=study.epochs)
    return {"seconds": seconds}


def _judged(study: Study, part: str, seed: int, split: str) -> Row:
    from forgetting.language import judged

    return judged(study.work, study.tofu, study.stories, split, seed)


def _language(study: Study, part: str, seed: int, method: str, rate: float, rank: int, split: str) -> Row:
    from forgetting.language import unlearn_authors

    return unlearn_authors(study.work, study.tofu, study.stories, split, method, rank, seed, rate)


_KINDS: dict[str, Callable[..., Row]] = {
    "read": _read,
    "base": _base,
    "reference": _reference,
    "federated": _federated,
    "memorise": _memorise,
    "judged": _judged,
    "language": _language,
}


def first_cells(study: Study) -> list[Cell]:
    """What does not depend on how methods were tuned."""
    from forgetting.language import BASELINES, LOW_RANK

    federations = [part for part in study.parts if part != "language"]
    seeds = [*study.seeds, TUNING]
    cells = [cell("base", part, seed) for part in federations for seed in seeds]
    cells += [cell("read", "tofu", 0)] if "tofu" in federations else []
    cells += [cell("reference", part, seed) for part in federations for seed in study.seeds]
    cells += [
        cell("federated", part, TUNING, method=method, rate=rate, rank=rank, later=False)
        for part in federations
        for method in study.methods
        for rate in RATES[part][: study.rates]
        for rank in (FILA_RANKS[part] if method == "loku" else (1,))
    ]
    if "language" in study.parts:
        middle = study.splits[len(study.splits) // 2]
        judged = [(TUNING, middle), *((seed, split) for seed in study.seeds for split in study.splits)]
        cells += [cell("memorise", "language", seed, split="full") for seed in seeds]
        for seed, split in judged:
            cells += [cell(kind, "language", seed, split=split) for kind in ("memorise", "judged")]
        cells += [
            cell("language", "language", TUNING, method=method, rate=rate, rank=16, split=middle)
            for method in (*LOW_RANK, *BASELINES)
            for rate in RATES["language"][: study.rates]
        ]
    return cells


def final_cells(study: Study, first: Iterable[Cell], done: Mapping[Cell, Row]) -> list[Cell]:
    """What is measured of each method whose settings are all tried."""
    from forgetting.language import LOW_RANK

    tuning: dict[tuple[str, str], list[Cell]] = {}
    for each in first:
        if each.seed == TUNING and each.kind in ("federated", "language"):
            tuning.setdefault((each.part, dict(each.options)["method"]), []).append(each)
    cells = []
    for (part, method), tried in tuning.items():
        if not all(each in done for each in tried):
            continue
        best = choose(done[each] for each in tried)[part, method]
        if part != "language":
            cells += [
                cell("federated", part, seed, method=method, **best, later=True) for seed in study.seeds
            ]
            continue
        for split in study.splits:
            for seed in study.seeds:
                every = method in LOW_RANK and seed == study.seeds[0]
                cells += [
                    cell("language", part, seed, method=method, **best, rank=rank, split=split)
                    for rank in (study.ranks if every else (16,))
                ]
    return cells


def rows_of(study: Study, done: Mapping[Cell, Row]) -> list[Row]:
    """Rows of the results from what is measured so far; without the seed that methods are tuned on."""
    kinds = ("reference", "federated", "language")
    order = {kind: number for number, kind in enumerate(kinds)}
    own = sorted(
        (c for c in done if c.kind in kinds and c.seed in study.seeds),
        key=lambda c: (order[c.kind], c.part, c.seed, c.name),
    )
    references = {(c.part, c.seed): done[c] for c in own if c.kind == "reference"}
    rows = [dict(done[c]) for c in own]
    for row in rows:
        reference = references.get((row["part"], row["seed"]))
        if row["kind"] == "federated" and reference is not None:
            compare(row, reference)
    return rows


def run(study: Study, jobs: int, target: Path) -> tuple[list[Any], dict[Cell, str]]:
    """The whole study; the results file is written on the way. Returns gates and failures."""
    from forgetting.federated_data import prepare

    seeds = [*study.seeds, TUNING]
    prepare(study.work, study.tofu, study.stories, seeds, study.parts)
    first = first_cells(study)
    began = written = time.monotonic()

    def told(done: Mapping[Cell, Row], left: int) -> None:
        nonlocal written
        last = list(done)[-1] if done else None
        seconds = f" {done[last]['cell_seconds']:.0f} s" if last else ""
        print(
            f"{time.monotonic() - began:4.0f} s, {left} left: {last.name if last else ''}{seconds}",
            flush=True,
        )
        if time.monotonic() - written > EVERY:
            write(study, done, target)
            written = time.monotonic()

    done, failed = carry_out(
        first, partial(measure, study), jobs=jobs, then=partial(final_cells, study, first), told=told
    )
    return write(study, done, target), failed


def write(study: Study, done: Mapping[Cell, Row], target: Path) -> list[Any]:
    """The results file and its picture, from what is measured so far; returns the gates."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results import write_results  # type: ignore[import-not-found]

    rows = rows_of(study, done)
    means = overall(rows)
    promised = gates(means, len(study.seeds), rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_results(target, rows=[*rows, *means], gates=promised)
    language = [row for row in means if row["part"] == "language"]
    if language:
        try:
            draw(language, target.with_suffix(".svg"))
        except ImportError:
            print("no matplotlib here: draw the picture elsewhere with --draw")
    return promised


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for, and write what is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tofu", type=Path, required=True, help="folder with TOFU's JSON Lines")
    parser.add_argument(
        "--stories", type=Path, required=True, help="folder with stories260K.bin and tok512.bin"
    )
    parser.add_argument("--parts", nargs="+", default=list(Study.parts), choices=Study.parts)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Study.seeds))
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells measured at the same time, one thread each"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/unlearning-study"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--small", action="store_true", help="one seed, few cells, for a look")
    parser.add_argument(
        "--draw", action="store_true", help="only draw the picture of the results that are there"
    )
    options = parser.parse_args(arguments)
    if options.draw:
        rows = json.loads(options.json.read_text())["rows"]
        draw(
            [row for row in rows if row["kind"] == "mean" and row["part"] == "language"],
            options.json.with_suffix(".svg"),
        )
        return 0
    if TUNING in options.seeds:
        parser.error(f"seed {TUNING} is the one that methods are tuned on; choose others")
    os.environ["OMP_NUM_THREADS"] = "1"
    study = Study(
        options.work.absolute(),
        options.tofu.absolute(),
        options.stories.absolute(),
        tuple(options.parts),
        tuple(options.seeds),
    )
    target = options.json
    if options.small:
        study = Study(
            *(study.work / "small", study.tofu, study.stories, study.parts, study.seeds[:1], 2, 3, 1),
            *(("loku", "gradient_difference"), 1, (16,), ("01",), 1),
        )
        target = study.work / "unlearning.json" if target == RESULTS else target
    promised, failed = run(study, options.jobs, target)
    for gate in promised:
        if not gate.met:
            print(f"MISSED {gate.name}: {gate.value:.4f} {gate.sense} {gate.bound:.4f}")
    for each, why in failed.items():
        print(f"FAILED {each.name}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
