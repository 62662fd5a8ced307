"""Merge rules compared where they differ: rules x heterogeneity x number of clients x seeds, with both bounds.

    python simulations/study.py                       # the whole matrix: hours
    python simulations/study.py --small               # `make study-small`: minutes
    python simulations/study.py --gather a.json b.json     # one results file of what several machines measured
    python simulations/study.py --rules fedavg "fedavgm beta=0.5" --alphas 0.1 --clients 5 --seeds 0 1 2

However many clients there are, the same number of them takes part in each round (``--participants``), so all runs of
a study train on equally many samples, and so do the bounds. A rule's options follow its name; with ``--tune``, each
rule that has such options gets the best of `TRIALS`, chosen in the default job on seeds of their own.

Each cell is a run of its own, through the in-process backend, with the whole model at each client: as through a
language host, but for rounding. What is measured is kept under ``--work``, one file a cell, so a study that was cut
off goes on where it was; so does one whose results file is there. FedAvg's cells also train each client alone and all
data in one place (the bounds), and merge by Fisher, from the same start over the same samples. Rules that leave
personal adapters are judged by their clients, on samples these hold out; the column ``judged`` says so, and their
figures do not compare with the others.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fednano.aggregation import rule_names
from fednano.errors import FednanoError
from fednano.federation.config import RunConfig
from fednano.federation.model import settled
from fednano.federation.recipe import parse_settings
from fednano.runs.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study.json"
# What is tried for the rules whose options decide what they do. Seeds for choosing are not those that are reported.
TRIALS = {
    "fedprox": ["mu=0.001", "mu=0.01", "mu=0.1"],
    "scaffold": [
        f"server_lr=1.0 | learning-rate={rate}" for rate in (0.1, 0.3, 1.0, 3.0, 10.0)
    ],  # its clients use SGD
    "fedavgm": [
        *(f"beta={beta}" for beta in (0.3, 0.5, 0.7, 0.9)),
        *(f"beta=0.0 server_lr={lr}" for lr in (1.5, 2.0, 3.0)),
        *("beta=0.3 server_lr=1.5", "beta=0.5 server_lr=0.7", "beta=0.9 server_lr=0.3"),
    ],
    "fedadam": [f"server_lr={lr} beta1={beta}" for lr in (0.003, 0.01, 0.03) for beta in (0.5, 0.9)],
    "fedyogi": [f"server_lr={lr} beta1=0.5" for lr in (0.003, 0.01, 0.03)],
    "fedadagrad": [f"server_lr={lr}" for lr in (0.01, 0.03, 0.1)],
    "qfedavg": ["q=0.1", "q=1.0"],
    "ties": ["density=0.2", "density=0.5"],
}
TUNING_SEEDS = (100, 101, 102)
MEASURED_WITH_FEDAVG = {"local_only": "local-only", "centralised": "centralised", "fisher": "fisher"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of the matrix; ``rule`` is a rule's name, its options behind it, and settings of the run behind a bar."""

    rule: str
    alpha: float
    clients: int
    seed: int
    rounds: int
    samples: int
    test: int
    participants: int = 5
    settings: tuple[str, ...] = ()

    def config(self, runs_dir: Path) -> RunConfig:
        """Its settings."""
        chosen, _, beside = self.rule.partition(" | ")
        name, _, options = chosen.partition(" ")
        plain = RunConfig.from_mapping(parse_settings(" ".join((*self.settings, beside)), "--set"))
        return plain.changed(
            rule=name,
            rule_options=options,
            fraction=min(1.0, self.participants / self.clients),
            alpha=self.alpha,
            clients=self.clients,
            seed=self.seed,
            rounds=self.rounds,
            samples=self.samples,
            evaluate_every=1,
            evaluate_samples=min(self.test, 300),
            final_samples=self.test,
            baselines=self.name == "fedavg" and not self.settings,
            placement="local",
            round_timeout=1e6,  # what a run gives must not depend on how busy the machine is
            runs_dir=str(runs_dir / "runs"),
        )

    def file(self, work: Path) -> Path:
        """Where its rows are kept; another setting, another file."""
        place = f"a{self.alpha:g}-c{self.clients}-s{self.seed}"
        return work / "cells" / f"{self.name}-{place}-{self.mark}.json"

    @property
    def mark(self) -> str:
        """Tells cells apart that differ in any setting."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule.split()[0]

    @property
    def options(self) -> str:
        """What stands behind it."""
        return self.rule.partition(" ")[2].removeprefix("| ")


def measure(cell: Cell, work: Path, target: float) -> list[Row]:
    """Run a cell, or read what was measured of it before; one row for each way of training."""
    path = cell.file(work)
    if not path.exists():
        from fednano.federation.simulation import simulate
        from fednano.runs import RunFolder, make_view

        base: Row = {"alpha": cell.alpha, "clients": cell.clients, "seed": cell.seed, "cell": cell.mark}
        try:
            folder = RunFolder.open(simulate(cell.config(work), backend="inprocess", view=make_view("quiet")))
        except FednanoError as error:  # such as a partition that these data do not allow: said in the results
            write_json(path, [base | {"rule": cell.name, "error": str(error)}])
        else:
            summary = folder.read_json("summary.json")
            rows = [base | row for row in rows_of(summary, folder.metrics())]
            write_json(
                path, [row | ({"options": cell.options} if row["rule"] == cell.name else {}) for row in rows]
            )
    kept: list[Row] = json.loads(path.read_text())
    for row in kept:
        note_target(row, target)
    return kept


def note_target(row: Row, target: float) -> None:
    """Add the first round that reached an accuracy, None if no round did."""
    curve = row.get("curve") or []
    row["rounds_to_target"] = next((n for n, accuracy in curve if accuracy >= target), None)


def take_over(cells: Sequence[Cell], results: Path, work: Path) -> None:
    """Put rows of a results file where `measure` finds them: what was measured elsewhere is not measured again."""
    known: dict[str, list[Row]] = {}
    for row in json.loads(results.read_text())["rows"] if results.exists() else []:
        known.setdefault(row.get("cell", ""), []).append(row)
    for cell in cells:
        path = cell.file(work)
        if cell.mark in known and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known[cell.mark])


def rows_of(summary: Row, metrics: list[Row]) -> Iterator[Row]:
    """One row for each way of training that a run measured."""
    accuracy = summary["accuracy"]
    ways = [(summary["rule"], "personalised" if "personalised" in accuracy else "federated", "federated")]
    ways += [(name, key, name) for key, name in MEASURED_WITH_FEDAVG.items() if key in accuracy]
    for rule, key, phase in ways:
        judged = [
            (row["round"], row["accuracy"])
            for row in metrics
            if row["phase"] == phase
            and row["scope"] == "global"
            and "train_loss" in row
            and "accuracy" in row
        ]
        yield {
            "rule": rule,
            "accuracy": accuracy[key],
            "judged": "clients" if key == "personalised" else "test set",
            "zero_shot": accuracy["zero_shot"],
            "curve": judged,
            "adapter_up": summary["bytes"]["adapter_up_per_client_round"] if phase == "federated" else None,
            "seconds": summary["phases"][key]["seconds"],
        }


def overall(rows: list[Row]) -> list[Row]:
    """Mean and standard deviation over the seeds of each rule, heterogeneity and number of clients."""
    groups: dict[tuple[str, float, int], list[Row]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault((row["rule"], row["alpha"], row["clients"]), []).append(row)
    out = []
    for (rule, alpha, clients), own in sorted(groups.items()):
        values = [row["accuracy"] for row in own]
        reached = [row["rounds_to_target"] for row in own if row["rounds_to_target"] is not None]
        out.append(
            {
                **{"rule": rule, "alpha": alpha, "clients": clients, "seed": "all", "seeds": len(own)},
                "judged": own[0]["judged"],
                "accuracy": {
                    **{"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else 0.0},
                    **{"min": min(values), "max": max(values)},
                },
                "reached_target": len(reached),
                "rounds_to_target": fmean(reached) if reached else None,
            }
        )
    return out


def best_trials(tried: dict[Cell, list[Row]]) -> dict[str, str]:
    """The options of each rule that did best over the tuning seeds, as rule's name to rule with options."""
    scores: dict[str, dict[str, list[float]]] = {}
    for cell, rows in tried.items():
        own = [row["accuracy"] for row in rows if row["rule"] == cell.name and "error" not in row]
        scores.setdefault(cell.name, {}).setdefault(cell.rule, []).extend(own or [0.0])
    for rules in scores.values():
        for rule, values in rules.items():
            print(
                f"{rule}: {fmean(values):.1%} ({', '.join(f'{value:.1%}' for value in values)})", flush=True
            )
    return {name: max(rules, key=lambda rule: fmean(rules[rule])) for name, rules in scores.items()}


def closed_gap(means: list[Row], rule: str) -> float | None:
    """The share of the gap between FedAvg and centralised training that a rule closes, where all three are known."""
    by = {(row["rule"], row["alpha"], row["clients"]): row["accuracy"]["mean"] for row in means}
    places = sorted({(row["alpha"], row["clients"]) for row in means})
    full = [p for p in places if all((name, *p) in by for name in ("fedavg", "centralised", rule))]
    gap = sum(by["centralised", *p] - by["fedavg", *p] for p in full)
    return sum(by[rule, *p] - by["fedavg", *p] for p in full) / gap if full and gap > 0 else None


def draw(means: list[Row], path: Path) -> None:
    """Accuracy over heterogeneity, a line for each rule and a picture for each number of clients."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    counts = sorted({row["clients"] for row in means})
    figure, panes = plt.subplots(1, len(counts), figsize=(5 * len(counts), 4), sharey=True, squeeze=False)
    for clients, pane in zip(counts, panes[0], strict=True):
        for rule in sorted({row["rule"] for row in means}):
            own = [row for row in means if row["rule"] == rule and row["clients"] == clients]
            pane.errorbar(
                [row["alpha"] for row in own],
                [100 * row["accuracy"]["mean"] for row in own],
                [100 * row["accuracy"]["sd"] for row in own],
                label=rule,
                capsize=2,
                linestyle="--" if rule in ("local-only", "centralised") else "-",
            )
        pane.set(xscale="log", xlabel="Dirichlet alpha", title=f"{clients} clients")
    panes[0][0].set_ylabel("accuracy, %")
    panes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def gathered(files: Sequence[Path], target: float) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of several results files, each cell's once, and the machines that they were measured on."""
    rows: dict[tuple[str, str], Row] = {}
    machines: list[dict[str, Any]] = []
    for file in files:
        document = json.loads(file.read_text())
        for row in document["rows"]:
            if row["seed"] != "all":
                note_target(row, target)
                rows.setdefault((row["cell"], row["rule"]), row)
        known = document["hardware"].pop("measured_on", None) or [document["hardware"]]
        machines += [machine for machine in known if machine not in machines]
    ordered = sorted(rows.values(), key=lambda r: (r["clients"], r["alpha"], r["rule"], r["seed"]))
    return ordered, machines


def write(rows: list[Row], target: Path, machines: Sequence[dict[str, Any]] = ()) -> None:
    """The results file and its picture; a rule that has no figure for the gate gets none."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from results import Gate, write_results  # type: ignore[import-not-found]

    means = overall(rows)
    share = closed_gap(means, settled(RunConfig()).rule)
    gates = (
        []
        if share is None
        else [Gate("share of the gap to centralised closed by the default", share, 0.5, ">=")]
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    hardware = {"measured_on": list(machines)} if machines else {}
    write_results(target, rows=[*rows, *means], gates=gates, hardware=hardware)
    if means:
        draw(means, target.with_suffix(".svg"))


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for, and write what is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", default=[n for n in rule_names() if n != "fisher"])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.5, 1.0, 100.0])
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 20, 50])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=300, help="training samples per client and round")
    parser.add_argument("--participants", type=int, default=5, help="clients that take part in each round")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of all runs"
    )
    parser.add_argument("--test", type=int, default=1000, help="test questions in each evaluation")
    parser.add_argument("--target", type=float, default=0.9, help="accuracy whose first round is reported")
    parser.add_argument("--jobs", type=int, default=1, help="cells measured at the same time")
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--tune", action="store_true", help="choose each rule's options among TRIALS first")
    parser.add_argument(
        "--gather", type=Path, nargs="+", metavar="FILE", help="measure nothing; make one file of these"
    )
    parser.add_argument("--small", action="store_true", help="a matrix of minutes, under runs/study-small")
    options = parser.parse_args(arguments)
    if options.small:
        parser.set_defaults(
            **{
                "rules": ["fedavg", "flexlora", "rolora"],
                "alphas": [0.1, 100.0],
                "clients": [5],
                "seeds": [0, 1],
            },
            **{"rounds": 3, "samples": 64, "test": 150, "work": Path("runs/study-small")},
            json=Path("runs/study-small/study.json"),
        )
        options = parser.parse_args(arguments)
    if options.gather:
        rows, machines = gathered(options.gather, options.target)
        write(rows, options.json, machines)
        return 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:

        def run(cells: list[Cell], target: Path | None) -> dict[Cell, list[Row]]:
            found: dict[Cell, list[Row]] = {}
            if target is not None:
                take_over(cells, target, options.work)
            written = time.monotonic()
            # The bounds make FedAvg's cells the longest: begun last, they would be waited for alone.
            order = sorted(cells, key=lambda cell: cell.name != "fedavg")
            waiting = {pool.submit(measure, cell, options.work, options.target): cell for cell in order}
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                print(f"{len(found)}/{len(cells)}: {waiting[done]}", flush=True)
                # Drawing takes as long as a small run does; what is measured is safe in its own file.
                if target is not None and (len(found) == len(cells) or time.monotonic() - written > 20):
                    write([row for cell in cells for row in found.get(cell, [])], target)
                    written = time.monotonic()
            return found

        def cells_of(
            rules: list[str], alphas: list[float], clients: list[int], seeds: Sequence[int]
        ) -> list[Cell]:
            return [
                Cell(
                    *(rule, alpha, count, seed, options.rounds, options.samples, options.test),
                    *(options.participants, tuple(options.set)),
                )
                for count, seed, alpha, rule in itertools.product(clients, seeds, alphas, rules)
            ]

        # FedAvg's cells measure Fisher merging, too.
        rules = [rule for rule in options.rules if rule != "fisher" or "fedavg" not in options.rules]
        if options.tune:
            trials = [f"{rule} {trial}" for rule in rules for trial in TRIALS.get(rule, [])]
            standard = RunConfig()
            tried = run(cells_of(trials, [standard.alpha], [standard.clients], TUNING_SEEDS), None)
            chosen = best_trials(tried)
            print("\n".join(f"chosen: {rule}" for rule in chosen.values()), flush=True)
            rules = [chosen.get(rule, rule) for rule in rules]
        run(cells_of(rules, options.alphas, options.clients, options.seeds), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
