"""How soon a site begins to train, with and without its warm worker: writes ``benchmarks/results/warm_clients.json``.

    .venv/bin/python benchmarks/warm_clients.py [--repeats 5]

Each message gets a process of its own that imports what Flower's own process imports, as at a SuperNode. ``start`` is
the time from the beginning of that process to the beginning of training, as the client itself measures it: imports,
model, data and connection. Cold: all of it in that process. Warm: the message is passed on to a worker, which was
started with the first message. The language host is one process for all. Ways are interleaved; gates are ratios of
medians.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, write_results

RESULTS = Path(__file__).parent / "results" / "warm_clients.json"


def message(path: Path, number: int, ticket: Any, cache: Path) -> None:
    """Write the request of a round as Flower's records."""
    from flwr.common.serde import recorddict_to_proto

    from fednano.federation.config import RunConfig
    from fednano.federation.messages import Instruction
    from fednano.federation.model import build_edge

    config = RunConfig(clients=3, samples=16, rank=4, cache_dir=str(cache))
    leaves = build_edge(config).travelling()
    asked = Instruction(config, "federated", number, ticket, False, {}, leaves)
    path.write_bytes(recorddict_to_proto(asked.to_records()).SerializeToString())


def deliver(path: Path, socket: str) -> float:
    """In a process of its own: carry a request out, here or in the worker; returns the measured start."""
    import flwr.supernode.runtime.run_clientapp  # noqa: F401 - what Flower's process imports
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict

    from fednano.federation import warm

    content = recorddict_from_proto(RecordDict.FromString(path.read_bytes()))
    node = {"site": "client-000", "partition-id": 0, "num-partitions": 3}
    if socket:
        reply = warm.forward(socket, "train", content, node)
    else:
        from fednano.federation.tasks import carry_out

        reply = carry_out("train", content, node, warm._process_start())
    head: Any = reply.config_records["head"]
    if "error" in head:
        raise SystemExit(f"the client failed: {head['error']}")
    start: Any = reply.metric_records["metrics"]["start"]
    return float(start)


def child(path: Path, socket: str) -> float:
    """Run :func:`deliver` in a process of its own."""
    command = [sys.executable, __file__, "--deliver", str(path), "--socket", socket]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(repeats: int) -> list[dict[str, Any]]:
    """Rows of way, round and start in seconds."""
    from fednano.federation.messages import HostTicket
    from fednano.host import HostProcess, host_command, new_token

    rows: list[dict[str, Any]] = []
    token = new_token()
    with (
        tempfile.TemporaryDirectory() as folder,
        HostProcess(host_command("tiny"), tokens=[token]) as host,
    ):
        root = Path(folder)
        ticket = HostTicket(host.address, token, fingerprint=host.fingerprint)
        for number in (1, 2):
            message(root / f"round-{number}", number, ticket, root / "cache")
        for repeat in range(repeats):
            for number in (1, 2):
                start = child(root / f"round-{number}", "")
                rows.append({"way": "cold", "round": number, "repeat": repeat, "start": start})
            socket = root / f"worker-{repeat}.sock"
            arguments = ["-m", "fednano.federation.warm", "--socket", str(socket)]
            worker = subprocess.Popen([sys.executable, "-P", *arguments])
            try:
                for number in (1, 2):
                    start = child(root / f"round-{number}", str(socket))
                    rows.append({"way": "warm", "round": number, "repeat": repeat, "start": start})
            finally:
                worker.terminate()
                worker.wait()
    return rows


def gates(rows: list[dict[str, Any]]) -> list[Gate]:
    """Round 2 with a worker against round 1 with it, and against round 2 without."""

    def middle(way: str, number: int) -> float:
        return median(row["start"] for row in rows if (row["way"], row["round"]) == (way, number))

    second = middle("warm", 2)
    return [
        Gate("round_1_over_round_2", middle("warm", 1) / second, 5.0, ">="),
        Gate("cold_round_2_over_warm_round_2", middle("cold", 2) / second, 5.0, ">="),
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--deliver", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--socket", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.deliver is not None:
        print(deliver(options.deliver, options.socket))
        return
    rows = measure(options.repeats)
    write_results(RESULTS, rows=rows, gates=gates(rows))
    for gate in gates(rows):
        print(f"{gate.name}: {gate.value:.2f} ({gate.sense} {gate.bound})")


if __name__ == "__main__":
    main()
