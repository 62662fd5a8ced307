"""Uplink codecs in the federated easy-VQA job: writes ``benchmarks/results/codecs.json``.

    .venv/bin/python benchmarks/codecs.py --jobs 2 [--seeds 0 1 2] [--only fp32 sign]

The default job with each codec, same seeds, same steps: bytes of a client's update as counted on the wire, over those
of fp32, and accuracy on the full test set. Rows that the file holds already are not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cells import Table, parser_of, run_job, verdict
from results import Gate

RESULTS = Path(__file__).parent / "results" / "codecs.json"
BOUNDS = {"int8": 0.30, "int4": 0.17, "sign": 0.06}
CODECS = ("fp32", "bf16", "int8", "int4", "sign")
POINT = 0.01

Job = tuple[str, int]
"""Codec and seed."""


def measure(job: Job) -> dict[str, Any]:
    """Run the default job once, in this process."""
    codec, seed = job
    done = run_job(codec=codec, seed=seed)
    return {
        "codec": codec,
        "seed": seed,
        "accuracy": done.accuracy,
        "uplink_bytes": done.summary["bytes"]["adapter_up_per_client_round"],
        "seconds": done.seconds,
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
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--only", nargs="+", choices=CODECS, default=CODECS)
    options = parser.parse_args()
    table = Table(
        options.json,
        key=lambda row: (row["codec"], row["seed"]),
        order=lambda row: (row["seed"], CODECS.index(row["codec"])),
        gates=gates,
    )
    table.work_off(
        [(codec, seed) for seed in options.seeds for codec in options.only],
        measure,
        at_a_time=options.jobs,
        line=lambda row: (
            f"{row['codec']:5} seed {row['seed']}: {row['accuracy']:.1%}, {row['uplink_bytes']:.0f} bytes"
        ),
    )
    return verdict(table.gates())


if __name__ == "__main__":
    sys.exit(main())
