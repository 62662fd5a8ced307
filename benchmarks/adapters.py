"""Every adapter in the federated easy-VQA job at equal steps: writes ``benchmarks/results/adapters.json``.

    .venv/bin/python benchmarks/adapters.py --jobs 2 [--seeds 0 1 2] [--only lora nano]

Methods differ in the learning rate they want by orders of magnitude, so each gets the best of `RATES`, chosen on a
seed of its own with test questions of its own kind (clients' held-out samples, never the test set). Then each runs
with every seed. A row is written as soon as it is measured, and rows that are there already are not measured again.
Runs are single-threaded and independent, ``--jobs`` of them at a time; ``seconds_per_round`` is only comparable between
rows of one ``--jobs``, and the table says which.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cells import Table, parser_of, run_job, verdict
from results import Gate

RESULTS = Path(__file__).parent / "results" / "adapters.json"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SWEEP_SEED = 100
TEST_QUESTIONS = 3000  # of 9,673; the standard error of an accuracy of 95 % is 0.4 points
# Ranks and options; the rank is the job's default where a method's own size is of that kind. LoRA-SB's is chosen for
# its promise: at most 1/27 of LoRA's bytes, the envelope of a message included.
ADAPTERS: dict[str, dict[str, Any]] = {
    "nano": {"rank": 16},
    "lora": {"rank": 16},
    "ffa": {"rank": 16},
    "lora-xs": {"rank": 16},
    "lora-sb": {"rank": 10},
    "svfit": {"rank": 64},
    "loldu": {"rank": 64},
    "shira": {"rank": 16},
    "loca": {"adapter_options": "count=512"},
    "lamda": {"rank": 16},
    "nola": {"rank": 16},
    "randlora": {"rank": 16},
    "mos": {
        "rank": 16,
        "adapter_options": "private_rank=0",
    },  # judged without what clients keep to themselves
    "wara": {"rank": 16},
    "tlora": {},
    "snella": {"rank": 16},
    "salt": {"rank": 16},
    "convlora": {"rank": 16},
    "sltrain": {"rank": 16},
    "lost": {"rank": 16},
}


@dataclass(frozen=True)
class Job:
    """One run."""

    adapter: str
    seed: int
    learning_rate: float
    sweep: bool


def measure(job: Job) -> dict[str, Any]:
    """Run one job in this process."""
    done = run_job(
        **ADAPTERS[job.adapter],
        adapter=job.adapter,
        seed=job.seed,
        learning_rate=job.learning_rate,
        holdout=0.1 if job.sweep else 0.0,
        final_samples=1 if job.sweep else TEST_QUESTIONS,
    )
    held = [row["accuracy"] for row in done.metrics if row.get("scope") == "client" and "accuracy" in row]
    return {
        **asdict(job),
        "accuracy": fmean(held) if job.sweep else done.accuracy,
        "zero_shot": None if job.sweep else done.summary["accuracy"]["zero_shot"],
        "uplink_bytes": done.summary["bytes"]["adapter_up_per_client_round"],
        "trainable": done.summary["parameters"]["trainable"],
        "seconds_per_round": done.summary["phases"]["federated"]["seconds"] / done.summary["rounds"],
        "seconds": done.seconds,
        "settings": ADAPTERS[job.adapter],
        "cores": os.cpu_count(),
    }


def best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of the best sweep row of each adapter; the smaller one of equals."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in sorted((row for row in rows if row["sweep"]), key=lambda row: row["learning_rate"]):
        if row["adapter"] not in found or row["accuracy"] > found[row["adapter"]]["accuracy"]:
            found[row["adapter"]] = row
    return {name: row["learning_rate"] for name, row in found.items()}


def gates(rows: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """The promises, over the means of all seeds."""
    finals = [row for row in rows if not row["sweep"]]

    def mean(adapter: str, column: str) -> float:
        return fmean(row[column] for row in finals if row["adapter"] == adapter)

    names = sorted({row["adapter"] for row in finals})
    made = [
        Gate(
            f"{name}: gain over zero-shot",
            mean(name, "accuracy") - mean(name, "zero_shot"),
            0.05,
            ">=",
        )
        for name in names
    ]
    if {"lora", "lora-sb"} <= set(names):
        gap = mean("lora", "accuracy") - mean("lora-sb", "accuracy")
        share = mean("lora-sb", "uplink_bytes") / mean("lora", "uplink_bytes")
        made += [
            Gate("lora-sb: accuracy below lora r16", gap, 0.02, "<="),
            Gate("lora-sb: bytes over lora r16", share, 1 / 27, "<="),
        ]
    return made


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over the bytes of an update, one point an adapter: means over the seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "fednano"
    import matplotlib.pyplot as plt

    figure, pane = plt.subplots(figsize=(8, 5))
    finals = [row for row in rows if not row["sweep"]]
    for name in dict.fromkeys(row["adapter"] for row in finals):
        size = fmean(row["uplink_bytes"] for row in finals if row["adapter"] == name)
        mean, deviation = spread(rows, name)
        pane.errorbar(size / 1e3, 100 * mean, 100 * deviation, fmt="o", capsize=2)
        pane.annotate(
            name, (size / 1e3, 100 * mean), xytext=(4, 4), textcoords="offset points", fontsize="small"
        )
    zero_shot = fmean(row["zero_shot"] for row in finals)
    pane.axhline(100 * zero_shot, linestyle="--", color="grey", label="before tuning")
    pane.set(xscale="log", xlabel="kB of an update", ylabel="accuracy, %")
    pane.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def spread(rows: Sequence[Mapping[str, Any]], adapter: str) -> tuple[float, float]:
    """Mean and standard deviation of an adapter's accuracy over the seeds."""
    values = [row["accuracy"] for row in rows if row["adapter"] == adapter and not row["sweep"]]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def described(row: Mapping[str, Any]) -> str:
    """A row as one line."""
    kind = "sweep" if row["sweep"] else f"seed {row['seed']}"
    line = f"{row['adapter']:10} {kind:7} lr {row['learning_rate']:g}: {row['accuracy']:.1%}"
    return f"{line}, {row['seconds']:.0f} s"


def main() -> int:
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--only", nargs="+", choices=sorted(ADAPTERS), default=list(ADAPTERS))
    options = parser.parse_args()
    table = Table(
        options.json,
        key=lambda row: Job(row["adapter"], row["seed"], row["learning_rate"], row["sweep"]),
        order=lambda r: (list(ADAPTERS).index(r["adapter"]), not r["sweep"], r["seed"], r["learning_rate"]),
        gates=gates,
    )

    def work_off(jobs: Sequence[Job]) -> None:
        table.work_off(jobs, measure, at_a_time=options.jobs, line=described)

    work_off([Job(name, SWEEP_SEED, rate, True) for name in options.only for rate in RATES])
    rates = best_rates(table.rows)
    work_off([Job(name, seed, rates[name], False) for name in options.only for seed in options.seeds])
    for name in options.only:
        mean, deviation = spread(table.rows, name)
        print(f"{name:10} {mean:.1%} ± {deviation:.1%}")
    draw(table.rows, options.json.with_suffix(".svg"))
    return verdict(table.gates())


if __name__ == "__main__":
    sys.exit(main())
