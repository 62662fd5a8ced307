"""Accuracy over epsilon on the default job: writes ``benchmarks/results/privacy.json``.

    .venv/bin/python benchmarks/privacy.py --jobs 32 [--seeds 0 1 2]

Each cell is a run in a process of its own: what is protected, how much noise, a seed. Single samples are protected in
the default job (5 clients); whole clients in one of 50, since the noise of the merged change goes with one over their
number, with as many sample visits as the default job has. Rows that the file holds already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import current_commit, read_results, write_results

RESULTS = Path(__file__).parent / "results" / "privacy.json"
SETTINGS: dict[str, dict[str, Any]] = {
    # Large batches: the noise of a step is divided by their size.
    "sample": {"clients": 5, "rounds": 10, "samples": 1024, "batch_size": 128, "dp_clip": 1.0},
    "client": {"clients": 50, "rounds": 10, "samples": 30, "batch_size": 16, "dp_clip": 0.5, "alpha": 1.0},
}
NOISES = (0.0, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 8.0)
"""0 is the same job without protection."""

Cell = tuple[str, float, int]


def measure(unit: str, noise: float, seed: int) -> dict[str, Any]:
    """One run, in this process."""
    import torch

    from fednano.federation.config import RunConfig
    from fednano.federation.simulation import simulate
    from fednano.runs import make_view

    torch.set_num_threads(1)
    began = time.monotonic()
    private: dict[str, Any] = {"dp": unit, "dp_noise": noise} if noise else {}
    job: dict[str, Any] = {
        name: value for name, value in SETTINGS[unit].items() if noise or name != "dp_clip"
    }
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            **job, **private, seed=seed, placement="local", evaluate_every=0, holdout=0.0, runs_dir=folder
        )
        path = simulate(config, backend="inprocess", view=make_view("quiet"))
        summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return {
        "unit": unit,
        "noise": noise,
        "seed": seed,
        "epsilon": summary["extra"]["privacy"]["epsilon"] if noise else None,
        "delta": config.dp_delta,
        "accuracy": summary["accuracy"]["federated"],
        "before": summary["accuracy"]["zero_shot"],
        **job,
        "seconds": time.monotonic() - began,
        "commit": current_commit(),
    }


def cell_of(row: Mapping[str, Any]) -> Cell:
    """What a row was measured for."""
    return row["unit"], row["noise"], row["seed"]


def save(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what there is; a curve promises nothing, so there are no gates."""
    write_results(RESULTS, rows=sorted(rows, key=cell_of), gates=[])


def main() -> None:
    """Measure the missing cells and write the results file after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--units", nargs="+", choices=sorted(SETTINGS), default=sorted(SETTINGS))
    parser.add_argument("--noises", type=float, nargs="+", default=list(NOISES))
    given = parser.parse_args()
    rows = list(read_results(RESULTS)["rows"]) if RESULTS.exists() else []
    known = {cell_of(row) for row in rows}
    missing = [
        (unit, noise, seed)
        for unit in given.units
        for noise in given.noises
        for seed in given.seeds
        if (unit, noise, seed) not in known
    ]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(measure, *cell) for cell in missing]):
            row = done.result()
            rows.append(row)
            save(rows)
            print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
