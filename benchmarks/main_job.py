"""The main job over several seeds, with its baselines: writes ``benchmarks/results/main_job.json``.

    .venv/bin/python benchmarks/main_job.py --seeds 0 1 2

Every number comes from the summary of a real run: five clients, language host, real data, the full test set.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, write_results

from fednano.federation.config import RunConfig
from fednano.federation.simulation import simulate

RESULTS = Path(__file__).parent / "results" / "main_job.json"
PHASES = ("zero_shot", "federated", "fisher", "local_only", "centralised")


def measure(seed: int, runs_dir: str) -> dict[str, Any]:
    """Run the default job with its baselines for one seed."""
    path = simulate(RunConfig(seed=seed, baselines=True, runs_dir=runs_dir))
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    row: dict[str, Any] = {"seed": seed}
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-dir", default="runs/main-job")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [measure(seed, options.runs_dir) for seed in options.seeds]
    means = {name: over_seeds(rows, name) for name in (*PHASES, "fisher_minus_fedavg")}
    first = next(row for row in rows if row["seed"] == min(options.seeds))
    activations = sum(first["bytes"][f"activation_{way}_per_sample_step"] for way in ("up", "down"))
    adapters = sum(first["bytes"][f"adapter_{way}_per_client_round"] for way in ("up", "down"))
    gates = [
        Gate("federated accuracy, default seed", first["federated"], 0.90, ">="),
        Gate("gain over zero-shot, default seed", first["federated"] - first["zero_shot"], 0.15, ">="),
    ]
    rows.append(
        {
            "seed": "all",
            **means,
            "activation_bytes_of_300_samples_over_adapter_bytes": 300 * activations / adapters,
        }
    )
    write_results(options.json, rows=rows, gates=gates)
    for gate in gates:
        print(f"{gate.name}: {gate.value:.4f} {gate.sense} {gate.bound}: {'met' if gate.met else 'MISSED'}")
    return 0 if all(gate.met for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
