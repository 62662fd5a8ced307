"""Uplink codecs in the federated easy-VQA job: writes ``benchmarks/results/codecs.json``.

    .venv/bin/python benchmarks/codecs.py --jobs 2 [--seeds 0 1 2]

The default job with each codec, same seeds, same steps: bytes of a client's update as counted on the wire, over those
of fp32, and accuracy on the full test set. Rows that the file holds already are not measured again.
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
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, current_commit, read_results, write_results

RESULTS = Path(__file__).parent / "results" / "codecs.json"
BOUNDS = {"int8": 0.30, "int4": 0.17, "sign": 0.06}
CODECS = ("fp32", "bf16", "int8", "int4", "sign")
POINT = 0.01


def measure(codec: str, seed: int) -> dict[str, Any]:
    """Run the default job once, in this process."""
    import torch

    from fednano.federation.config import RunConfig
    from fednano.federation.simulation import simulate
    from fednano.runs import make_view

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # A local model gives the same bits as a hosted one, which a test holds.
        config = RunConfig(codec=codec, seed=seed, placement="local", evaluate_every=0, runs_dir=folder)
        path = simulate(config, backend="inprocess", view=make_view("quiet"))
        summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return {
        "codec": codec,
        "seed": seed,
        "accuracy": summary["accuracy"]["federated"],
        "uplink_bytes": summary["bytes"]["adapter_up_per_client_round"],
        "seconds": time.monotonic() - began,
        "commit": current_commit(),
    }


def gates(rows: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """Bytes over fp32's, and accuracy below fp32's, each over the seeds that both have."""
    by_codec = {codec: {row["seed"]: row for row in rows if row["codec"] == codec} for codec in CODECS}
    plain, made = by_codec["fp32"], []
    for codec, bound in BOUNDS.items():
        seeds = sorted(set(plain) & set(by_codec[codec]))
        if not seeds:
            continue
        share = fmean(by_codec[codec][seed]["uplink_bytes"] / plain[seed]["uplink_bytes"] for seed in seeds)
        gap = fmean(plain[seed]["accuracy"] - by_codec[codec][seed]["accuracy"] for seed in seeds)
        made += [
            Gate(f"{codec}: bytes over fp32", share, bound, "<="),
            Gate(f"{codec}: accuracy below fp32", gap, POINT, "<="),
        ]
    return made


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = read_results(options.json)["rows"] if options.json.exists() else []
    there = {(row["codec"], row["seed"]) for row in rows}
    todo = [(codec, seed) for seed in options.seeds for codec in CODECS if (codec, seed) not in there]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure, *job) for job in todo]):
            row = future.result()
            rows.append(row)
            rows.sort(key=lambda row: (row["seed"], CODECS.index(row["codec"])))
            print(
                f"{row['codec']:5} seed {row['seed']}: {row['accuracy']:.1%}, {row['uplink_bytes']:.0f} bytes",
                flush=True,
            )
            write_results(options.json, rows=rows, gates=gates(rows))
    missed = [gate for gate in gates(rows) if not gate.met]
    for gate in missed:
        print(f"MISSED {gate.name}: {gate.value:.4f} {gate.sense} {gate.bound:.4f}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
