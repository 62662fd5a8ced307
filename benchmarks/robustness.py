"""Merge rules against clients that send the opposite of what they learned: ``benchmarks/results/robustness.json``.

    .venv/bin/python benchmarks/robustness.py --jobs 2 [--seeds 0] [--only krum median]

The default job with each rule, with and without attackers, over data that is spread evenly and over Dirichlet data. One
client of 5, or 2 of 10, flip the sign of their change and send it four times as large in every round, which cancels
what the others learned. ``drop`` in the gates is how far accuracy on the full test set falls below the same rule's run
without attackers. Rules that want to know how many attackers there are, are told.
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

RESULTS = Path(__file__).parent / "results" / "robustness.json"
ATTACKERS = {5: 1, 10: 2}
STRENGTH = 4
ROBUST = ("krum", "multikrum", "median", "trimmed", "bulyan", "geomedian", "normclip")
RULES = ("fedavg", *ROBUST)
POINTS = 0.03

Job = tuple[str, int, str, bool, int]
"""Rule, clients, partition, whether there are attackers, seed."""


def options_of(rule: str, clients: int) -> str:
    """What a rule is told of the federation."""
    attackers = ATTACKERS[clients]
    return {
        "krum": f"malicious={attackers}",
        "multikrum": f"malicious={attackers}",
        "bulyan": f"malicious={min(attackers, (clients - 3) // 4)}",
        "trimmed": f"beta={attackers / clients}",
        "normclip": "bound=1.0",
    }.get(rule, "")


def measure(job: Job) -> dict[str, Any]:
    """Run the job once, in this process."""
    rule, clients, partition, attacked, seed = job
    done = run_job(
        rule=rule,
        rule_options=options_of(rule, clients),
        clients=clients,
        partition=partition,
        seed=seed,
        holdout=0.0,
        faults=f"sign-flip:{ATTACKERS[clients]}:{STRENGTH}" if attacked else "",
    )
    return {
        "rule": rule,
        "options": options_of(rule, clients),
        "clients": clients,
        "partition": partition,
        "attacked": attacked,
        "seed": seed,
        "accuracy": done.accuracy,
        "zero_shot": done.summary["accuracy"]["zero_shot"],
        "seconds": done.seconds,
    }


def gates(rows: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """How far each rule falls below its own clean run, over the seeds that both have."""
    made = []
    found = {key_of(row): row["accuracy"] for row in rows}
    for clients, attackers in ATTACKERS.items():
        for partition in ("iid", "dirichlet"):
            for rule in RULES:
                seeds = sorted({row["seed"] for row in rows})
                drops = [
                    found[rule, clients, partition, False, seed] - found[rule, clients, partition, True, seed]
                    for seed in seeds
                    if {(rule, clients, partition, on, seed) for on in (False, True)} <= set(found)
                ]
                if drops:
                    name = f"{rule}: drop, {attackers} of {clients} flip, {partition}"
                    made.append(Gate(name, fmean(drops), POINTS, ">=" if rule == "fedavg" else "<="))
    return made


def key_of(row: Mapping[str, Any]) -> Job:
    """The job that a row is of."""
    return row["rule"], row["clients"], row["partition"], row["attacked"], row["seed"]


def jobs(rules: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All cells. Bulyan needs seven updates against one attacker, so it has no cell among five clients."""
    return [
        (rule, clients, partition, attacked, seed)
        for seed in seeds
        for clients in ATTACKERS
        for partition in ("iid", "dirichlet")
        for rule in rules
        for attacked in (False, True)
        if not (rule == "bulyan" and clients < 7)
    ]


def described(row: Mapping[str, Any]) -> str:
    """A row as one line."""
    state = "attacked" if row["attacked"] else "clean"
    cell = f"{row['rule']:10} {row['clients']:2} clients {row['partition']:9} {state:8} seed {row['seed']}"
    return f"{cell}: {row['accuracy']:.1%}, {row['seconds']:.0f} s"


def main() -> int:
    parser = parser_of(__doc__, RESULTS)
    parser.add_argument("--only", nargs="+", choices=RULES, default=RULES)
    options = parser.parse_args()
    table = Table(
        options.json,
        key=key_of,
        order=lambda row: (
            row["seed"],
            row["clients"],
            row["partition"],
            RULES.index(row["rule"]),
            row["attacked"],
        ),
        gates=gates,
    )
    table.work_off(jobs(options.only, options.seeds), measure, at_a_time=options.jobs, line=described)
    return verdict(table.gates())


if __name__ == "__main__":
    sys.exit(main())
