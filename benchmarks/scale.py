"""Many simulated clients in each round: writes ``benchmarks/results/scale.json`` and ``scale.svg``.

    .venv/bin/python benchmarks/scale.py [--clients 100 200 500 1000] [--backend ray]

All clients take part in each of the rounds, with one small step each, so that what is measured is what a client costs
beside its training. Each size is a run in a process of its own; memory is the resident size of it and of all processes
it started, read every tenth of a second, and the image features, which grow with the data and not with the clients, are
computed before. Seconds are those of the last round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, current_commit, read_results, write_results

RESULTS = Path(__file__).parent / "results" / "scale.json"
ROUNDS, SAMPLES = 2, 4
FLAT = 1.15
PAGE = 4096


def settings(clients: int, runs_dir: str, cache_dir: str) -> dict[str, Any]:
    """The run: every client in every round, one step each, no evaluation to speak of."""
    return {
        "clients": clients,
        "partition": "iid",
        "rounds": ROUNDS,
        "samples": SAMPLES,
        "batch_size": SAMPLES,
        "holdout": 0.0,
        "evaluate_every": 0,
        "final_samples": 1,
        "placement": "local",
        "round_timeout": 7200.0,
        "join_timeout": 7200.0,
        "runs_dir": runs_dir,
        "cache_dir": cache_dir,
    }


def resident(root: int) -> int:
    """Resident bytes of a process and of all its descendants."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                sizes[int(folder.name)] = PAGE * int((folder / "statm").read_text().split()[1])
            except (OSError, IndexError):
                continue  # it has ended meanwhile
            parents[int(folder.name)] = int(stat[1])
    family, total = {root}, 0
    grown = True
    while grown:
        fresh = {pid for pid, parent in parents.items() if parent in family} - family
        family |= fresh
        grown = bool(fresh)
    for pid in family:
        total += sizes.get(pid, 0)
    return total


def play(clients: int, backend: str, cache_dir: str) -> dict[str, Any]:
    """Run once in a process of its own, and watch its memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--play", str(clients), "--backend", backend]
        child = subprocess.Popen(
            [*command, "--cache", cache_dir, "--runs", folder], stdout=subprocess.PIPE, text=True
        )
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                peak[0] = max(peak[0], resident(child.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            answer, _ = child.communicate()
        finally:
            done.set()
            watcher.join()
    if child.returncode:
        raise RuntimeError(f"the run with {clients} clients ended with status {child.returncode}")
    return {
        "clients": clients,
        "backend": backend,
        "peak_bytes": peak[0],
        **json.loads(answer.splitlines()[-1]),
    }


def child(clients: int, backend: str, cache_dir: str, runs_dir: str) -> None:
    """The run; prints what its metrics say as one line."""
    from fednano.federation.config import RunConfig
    from fednano.federation.simulation import simulate
    from fednano.runs import make_view

    config = RunConfig(**settings(clients, runs_dir, cache_dir))
    path = simulate(config, backend=backend, view=make_view("quiet"))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rounds = [
        row for row in rows if row["scope"] == "global" and row["phase"] == "federated" and "bytes" in row
    ]
    merged = [row for row in rows if row["scope"] == "client" and "refused" not in row]
    seconds = {row["round"]: row["seconds"] for row in rounds}
    print(
        json.dumps(
            {
                "merged": len(merged),
                "seconds_per_client": seconds[ROUNDS] / clients,
                "first_round_seconds_per_client": seconds[1] / clients,
            }
        )
    )


def encode(cache_dir: str) -> None:
    """Compute the features of all images, so that no run is the first to need one."""
    from fednano.federation.config import RunConfig
    from fednano.federation.model import build_edge, load_data
    from fednano.training.features import FeatureCache

    config = RunConfig()
    FeatureCache(build_edge(config).edge, Path(cache_dir)).warm(list(load_data(config)))


def gates(rows: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """The largest size against the smallest."""
    least, most = rows[0], rows[-1]
    ends = f"{most['clients']} clients over {least['clients']}"
    return [
        Gate(f"resident memory, {ends}", most["peak_bytes"] / least["peak_bytes"], FLAT, "<="),
        Gate(
            f"seconds per client, {ends}",
            most["seconds_per_client"] / least["seconds_per_client"],
            FLAT,
            "<=",
        ),
        Gate("updates that are missing", sum(r["clients"] * ROUNDS - r["merged"] for r in rows), 0, "<="),
    ]


def plot(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Memory and time over the number of clients."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "fednano"  # the same picture, the same file
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3))
    clients = [row["clients"] for row in rows]
    left.plot(clients, [row["peak_bytes"] / 2**20 for row in rows], "o-")
    left.set_ylabel("peak resident memory, MiB")
    right.plot(clients, [1e3 * row["seconds_per_client"] for row in rows], "o-")
    right.set_ylabel("milliseconds per client and round")
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.set_xlabel("clients in each round")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 200, 500, 1000])
    parser.add_argument("--backend", choices=("inprocess", "ray"), default="inprocess")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--play", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", default="", help=argparse.SUPPRESS)
    parser.add_argument("--runs", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        child(options.play, options.backend, options.cache, options.runs)
        return 0
    rows = read_results(options.json)["rows"] if options.json.exists() else []
    with tempfile.TemporaryDirectory() as cache:
        todo = sorted(
            set(options.clients) - {row["clients"] for row in rows if row["backend"] == options.backend}
        )
        if todo:
            encode(cache)
        for clients in todo:
            rows.append({**play(clients, options.backend, cache), "commit": current_commit()})
            row = rows[-1]
            print(
                f"{clients:5} clients: {row['peak_bytes'] / 2**20:.0f} MiB, "
                f"{1e3 * row['seconds_per_client']:.1f} ms a client and round",
                flush=True,
            )
    rows = sorted((row for row in rows if row["backend"] == options.backend), key=lambda row: row["clients"])
    made = gates(rows)
    write_results(options.json, rows=rows, gates=made)
    plot(rows, options.json.with_suffix(".svg"))
    for gate in made:
        print(f"{'met   ' if gate.met else 'MISSED'} {gate.name}: {gate.value:.3f} {gate.sense} {gate.bound}")
    return 0 if all(gate.met for gate in made) else 1


if __name__ == "__main__":
    sys.exit(main())
