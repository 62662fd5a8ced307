"""The main job over several seeds, with its baselines: writes ``benchmarks/results/main_job.json``.

    .venv/bin/python benchmarks/main_job.py --seeds 0 1 2 [--again] [--backend inprocess --jobs 3]

Every number comes from the summary of a real run: five clients, language host, real data, the full test set. A seed
that the file holds already is not run again unless asked; each row names the commit that it was measured on. Both
backends give the same bits, which a test holds; how many runs shared the machine stands beside its name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, current_commit, judge_again, read_results, write_results

from fednano.federation.config import BACKENDS, RunConfig
from fednano.federation.simulation import simulate

RESULTS = Path(__file__).parent / "results" / "main_job.json"
TRIAL = 0.931, 0.970
"""FedAvg and training in one place, in the trial of this job that the promise for the default rule was made against."""
PHASES = ("zero_shot", "federated", "fisher", "local_only", "centralised")


def measure(seed: int, runs_dir: str, backend: str) -> dict[str, Any]:
    """Run the default job with its baselines for one seed."""
    config = RunConfig(seed=seed, baselines=True, evaluate_every=0, runs_dir=runs_dir)
    path = simulate(config, backend=backend)
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    row: dict[str, Any] = {"seed": seed, "commit": current_commit()}
    row |= {name: summary["accuracy"][name] for name in PHASES}
    row["fisher_minus_fedavg"] = row["fisher"] - row["federated"]
    row["local_only_range"] = summary["extra"]["spread"]["local-only"]
    row["seconds"] = {name: summary["phases"][name]["seconds"] for name in PHASES[1:]}
    row["bytes"] = summary["bytes"]
    row["parameters"] = summary["parameters"]
    return row


def over_seeds(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Mean and standard deviation of one column."""
    values = [row[name] for row in rows]
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def gates_of(rows: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """Promises for the first seed, and for the mean of three or more."""
    measured = [row for row in rows if row["seed"] != "all"]
    first = measured[0]
    found = [
        Gate("federated accuracy, default seed", first["federated"], 0.90, ">="),
        Gate("gain over zero-shot, default seed", first["federated"] - first["zero_shot"], 0.15, ">="),
    ]
    if len(measured) >= 3:
        low, high = TRIAL
        share = (fmean(row["federated"] for row in measured) - low) / (high - low)
        gap = f"{100 * low:g} to {100 * high:g} %"
        name = f"share of the trial's gap ({gap}) closed by the default, {len(measured)} seeds"
        found.append(Gate(name, share, 0.5, ">="))
    return found


def write(measured: list[dict[str, Any]], target: Path, jobs: int = 1) -> None:
    """Write rows, their means, and the gates."""
    means = {name: over_seeds(measured, name) for name in (*PHASES, "fisher_minus_fedavg")}
    first = measured[0]
    activations = sum(first["bytes"][f"activation_{way}_per_sample_step"] for way in ("up", "down"))
    adapters = sum(first["bytes"][f"adapter_{way}_per_client_round"] for way in ("up", "down"))
    ratio = RunConfig().samples * activations / adapters
    overall = {"seed": "all", **means, "activation_over_adapter_bytes_a_round": ratio}
    rows = [*measured, overall]
    write_results(target, rows=rows, gates=gates_of(rows), hardware={"runs_at_a_time": jobs})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", default="runs/main-job")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure seeds anew that the file holds already")
    parser.add_argument("--backend", choices=BACKENDS, default="ray")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time; more than one in process only"
    )
    options = parser.parse_args()
    if options.jobs > 1 and options.backend != "inprocess":
        parser.error("--jobs: each run through Ray takes the whole machine; add --backend inprocess")
    old = read_results(options.json)["rows"] if options.json.exists() and not options.again else []
    rows = [row for row in old if row["seed"] in options.seeds]
    missing = [seed for seed in options.seeds if all(row["seed"] != seed for row in rows)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(measure, seed, options.runs_dir, options.backend) for seed in missing]
        for done in as_completed(
            waiting
        ):  # written after each seed: a run that is cut off leaves what it measured
            rows.append(done.result())
            rows.sort(key=lambda row: options.seeds.index(row["seed"]))
            write(rows, options.json, options.jobs)
    if not missing:  # the same rows: only what they are judged by may have changed
        judge_again(options.json, gates_of)
    gates = gates_of(rows)
    for gate in gates:
        print(f"{gate.name}: {gate.value:.4f} {gate.sense} {gate.bound}: {'met' if gate.met else 'MISSED'}")
    return 0 if all(gate.met for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
