"""Accuracy over epsilon on the default job: writes ``benchmarks/results/privacy.json``.

    .venv/bin/python benchmarks/privacy.py --jobs 32 [--seeds 0 1 2]

Each cell is a run in a process of its own: what is protected, how much noise, a seed. Single samples are protected in
the default job (5 clients); whole clients in one of 50, since the noise of the merged change goes with one over their
number, with as many sample visits as the default job has. Rows that the file holds already are not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cells import Table, parser_of, run_job

RESULTS = Path(__file__).parent / "results" / "privacy.json"
SETTINGS: dict[str, dict[str, Any]] = {
    # Large batches: the noise of a step is divided by their size.
    "sample": {"clients": 5, "rounds": 10, "samples": 1024, "batch_size": 128, "dp_clip": 1.0},
    "client": {"clients": 50, "rounds": 10, "samples": 30, "batch_size": 16, "dp_clip": 0.5, "alpha": 1.0},
}
NOISES = (0.0, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 8.0)
"""0 is the same job without protection."""

Cell = tuple[str, float, int]
"""What is protected, the noise, the seed."""


def measure(cell: Cell) -> dict[str, Any]:
    """One run, in this process."""
    unit, noise, seed = cell
    private: dict[str, Any] = {"dp": unit, "dp_noise": noise} if noise else {}
    job: dict[str, Any] = {
        name: value for name, value in SETTINGS[unit].items() if noise or name != "dp_clip"
    }
    done = run_job(**job, **private, seed=seed, holdout=0.0)
    privacy = done.summary["extra"].get("privacy", {})
    return {
        "unit": unit,
        "noise": noise,
        "seed": seed,
        "epsilon": privacy["epsilon"] if noise else None,
        "delta": privacy["delta"] if noise else None,
        "accuracy": done.accuracy,
        "before": done.summary["accuracy"]["zero_shot"],
        **job,
        "seconds": done.seconds,
    }


def cell_of(row: Mapping[str, Any]) -> Cell:
    """What a row was measured for."""
    return row["unit"], row["noise"], row["seed"]


def described(row: Mapping[str, Any]) -> str:
    """A row as one line."""
    epsilon = "not private" if row["epsilon"] is None else f"epsilon {row['epsilon']:.2f}"
    cell = f"{row['unit']} noise {row['noise']:g} seed {row['seed']}"
    return f"{cell}: {epsilon}, {row['accuracy']:.1%}, {row['seconds']:.0f} s"


def main() -> int:
    """Measure the missing cells; a curve promises nothing, so there are no gates."""
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--units", nargs="+", choices=sorted(SETTINGS), default=sorted(SETTINGS))
    parser.add_argument("--noises", type=float, nargs="+", default=list(NOISES))
    options = parser.parse_args()
    table = Table(options.json, key=cell_of, order=cell_of, gates=lambda _: [])
    cells = [
        (unit, noise, seed) for seed in options.seeds for unit in options.units for noise in options.noises
    ]
    table.work_off(cells, measure, at_a_time=options.jobs, line=described)
    return 0


if __name__ == "__main__":
    sys.exit(main())
