"""A deployment under random kills for half an hour: writes ``benchmarks/results/soak.json``.

    .venv/bin/python benchmarks/soak.py --minutes 30 --clients 8 [--seed 0] [--json FILE]

Server, language host and sites are the processes of `fednano server up` and `fednano client up` on loopback, with TLS
and node keys. Runs follow each other, each from the adapter of the one before. At random times, drawn from the seed,
`kill -9` hits host, SuperLink, the run's ServerApp, a site's worker or its SuperNode. Every few seconds the resident
memory of server and host is taken, over all their processes. Gates: memory in the last third
at most 1.1 times what it was when the second third began; every round done, every request in it answered for; a round
finished after every kill; the final adapter finite, and at least as good as none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, write_results

from fednano.deploy.enrolment import enroll
from fednano.deploy.node import free_port, read_status
from fednano.deploy.order import Order
from fednano.deploy.orders import Orders
from fednano.deploy.plan import Plan
from fednano.deploy.provision import init, sign
from fednano.deploy.supervise import alive, bearers
from fednano.runs import RunFolder
from fednano.security.place import ServerPlace

RESULTS = Path(__file__).parent / "results" / "soak.json"
FEDNANO = str(Path(sys.executable).with_name("fednano"))
SETTINGS: dict[str, Any] = {
    "rule": "fedavg",
    "samples": 16,
    "batch-size": 8,
    "rank": 8,
    "evaluate-every": 0,
    "final-samples": 64,
    "holdout": 0.0,
    "round-timeout": 60.0,
    "join-timeout": 120.0,
}
WEIGHTS = {"worker": 3, "host": 2, "app": 2, "supernode": 2, "superlink": 1}
SAMPLE_S, QUIET_S = 5.0, 20.0


@dataclass
class Soak:
    """What was seen, and the processes that it was seen of.

    Attributes:
        root: folder of everything.
        sites: names of the sites.
        began: when it began, on the monotonic clock.
        memory: seconds, round count, MiB of server and host.
        kills: seconds, what, whose, and rounds finished before.
    """

    root: Path
    sites: list[str]
    began: float = field(default_factory=time.monotonic)
    memory: list[dict[str, float]] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def place(self) -> ServerPlace:
        """The server's folder."""
        return ServerPlace(self.root / "federation" / "server")

    @property
    def orders(self) -> Orders:
        """What the server is to do."""
        return Orders(self.place)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    def provision(self) -> None:
        """The federation, each site with its part of easy-VQA."""
        plan = Plan(
            *("soak", tuple(self.sites), ("127.0.0.1",)),
            listen="127.0.0.1",
            fleet_port=free_port(),
            host_port=free_port(),
        )
        folder = self.root / "federation"
        init(plan, folder)
        for number, site in enumerate(self.sites):
            holds: dict[str, str | int] = {"partition-id": number, "num-partitions": len(self.sites)}
            invitation = folder / "invitations" / f"{site}.invitation.json"
            enroll(sign(folder, enroll(invitation, self.root / site, holds)), self.root / site)

    def start(self, name: str, *words: str) -> None:
        """A command of fednano, that stays."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes.append(subprocess.Popen([FEDNANO, *words], stdout=log, stderr=log, cwd=self.root))

    def pid(self, folder: Path, name: str) -> int:
        """A process that a server or a site keeps running; 0 when it is down."""
        status: Mapping[str, Any] = read_status(folder / "state") or {"processes": []}
        return next((int(each["pid"]) for each in status["processes"] if each["name"] == name), 0)

    def rounds(self) -> int:
        """Rounds finished, of all runs."""
        return sum(len(RunFolder(run).checkpoints()) for run in runs_of(self.orders))

    def kill(self, draws: random.Random) -> None:
        """One process, at random."""
        what = draws.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        site = draws.choice(self.sites) if what in ("worker", "supernode") else ""
        if what == "app":
            pid = next((pid for pid in self.place.active().values() if alive(pid)), 0)
        else:
            pid = self.pid(self.root / site if site else self.place.root, what)
        if pid:
            os.kill(pid, signal.SIGKILL)
            self.kills.append(
                {"at_s": self.seconds, "killed": what, "site": site, "rounds_before": self.rounds()}
            )

    def sample(self) -> None:
        """Take the memory, unless a part is down."""
        marks = self.place.root / "state" / "marks.json"
        if not marks.exists() or not any(alive(pid) for pid in self.place.active().values()):
            return
        superlink, host = (bearers(mark) for mark in json.loads(marks.read_text()))
        if superlink and host:
            server = [self.processes[0].pid, *superlink]
            found = {"server_mib": rss_mib(server), "host_mib": rss_mib(host)}
            self.memory.append({"at_s": self.seconds, "rounds": float(self.rounds()), **found})

    def stop(self) -> None:
        """End everything in order."""
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            process.wait(120)


def runs_of(orders: Orders) -> list[Path]:
    """The runs of a server, oldest first."""
    return sorted(p for p in orders.runs.glob("2*") if (p / "config.json").exists() and not p.is_symlink())


def rss_mib(pids: list[int]) -> float:
    """Resident memory of processes together. Not the proportional one: that moves with what others map."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Rss:"))
    return total / 1024


def work(soak: Soak, minutes: float, rounds: int, seed: int, pause: float) -> list[Order]:
    """Run after run until the time is up, with kills; returns their orders, the last one ended without any."""
    draws, end = random.Random(seed), minutes * 60
    next_kill, next_sample, orders = QUIET_S, 0.0, []
    order = None
    while soak.seconds < end or (order is not None and order.state in ("waiting", "running")):
        if order is None or order.state not in ("waiting", "running"):
            if order is not None and order.state == "failed":
                break
            before: dict[str, str] = {}
            if order is not None:
                before["start-from"] = str(soak.orders.runs / order.run)
            order = soak.orders.submit({**SETTINGS, "rounds": rounds, "seed": seed, **before})
            orders.append(order.id)
        time.sleep(1)
        order = soak.orders.get(order.id)
        if soak.seconds >= next_sample:
            soak.sample()
            next_sample = soak.seconds + SAMPLE_S
        if next_kill <= soak.seconds < end and soak.rounds():
            soak.kill(draws)
            next_kill = soak.seconds + QUIET_S + draws.expovariate(1 / pause)
    return [soak.orders.get(identity) for identity in orders]


def unanswered(run: Path, clients: int, rounds: int) -> tuple[int, int]:
    """Rounds of a run that left no record, and requests in them of which it is not said what became of them."""
    records = [r for r in RunFolder(run).metrics() if r.get("phase") == "federated" and r.get("round")]
    done = {r["round"] for r in records if r["scope"] == "global"}
    told = {(r["client"], r["round"]) for r in records if r["scope"] == "client"}
    return rounds - len(done), clients * rounds - len(told)


def growth(memory: list[dict[str, float]], name: str, end: float) -> float:
    """Median memory of the last third, over that of the first fifth of the second."""
    third = end / 3
    last = [m[name] for m in memory if m["at_s"] >= 2 * third]
    begin = [m[name] for m in memory if third <= m["at_s"] < 1.2 * third]
    begin = begin or [m[name] for m in memory if m["at_s"] >= third][:1]
    return median(last) / median(begin) if last and begin else 0.0


def judge(
    soak: Soak, orders: list[Order], rounds: int, end: float
) -> tuple[list[dict[str, Any]], list[Gate]]:
    """Rows and gates of what was seen."""
    from safetensors.torch import load_file

    runs = [soak.orders.runs / order.run for order in orders if order.run]
    done = [run for run in runs if (run / "summary.json").exists()]
    summaries = [json.loads((run / "summary.json").read_text()) for run in done]
    zero, tuned = (summaries[0]["accuracy"], summaries[-1]["accuracy"]) if done else ({}, {})
    found = [unanswered(run, len(soak.sites), rounds) for run in runs]
    last = load_file(done[-1] / "adapter.safetensors") if done else {}
    finite = bool(last) and all(bool(leaf.isfinite().all()) for leaf in last.values())
    finished = soak.rounds()
    lost = [kill for kill in soak.kills if kill["rounds_before"] >= finished]
    refused = [r for run in runs for r in RunFolder(run).metrics() if r.get("refused")]
    facts = {
        "clients": len(soak.sites),
        "seconds": soak.seconds,
        "runs": len(orders),
        "rounds": finished,
        "kills": len(soak.kills),
        "by_kind": {kind: sum(kill["killed"] == kind for kill in soak.kills) for kind in WEIGHTS},
        "updates_not_merged": len(refused),
        "accuracy_zero_shot": zero.get("zero_shot"),
        "accuracy_tuned": tuned.get("federated"),
        "server_mib_median": median(m["server_mib"] for m in soak.memory) if soak.memory else None,
        "host_mib_median": median(m["host_mib"] for m in soak.memory) if soak.memory else None,
    }
    every = max(1, math.ceil(len(soak.memory) / 60))
    rows = [
        {"kind": "summary", **facts},
        *({"kind": "kill", **kill} for kill in soak.kills),
        *({"kind": "memory", **sample} for sample in soak.memory[::every]),
        *(
            {"kind": "refused", "round": r["round"], "client": r["client"], "why": r["refused"]}
            for r in refused
        ),
    ]
    gain = float(tuned.get("federated") or 0.0) - float(zero.get("zero_shot") or 0.0) if done else -1.0
    gates = [
        Gate("server_memory_last_third_over_second", growth(soak.memory, "server_mib", end), 1.1, "<="),
        Gate("host_memory_last_third_over_second", growth(soak.memory, "host_mib", end), 1.1, "<="),
        Gate("memory_samples", len(soak.memory), 10, ">="),
        Gate("orders_not_done", sum(order.state != "done" for order in orders), 0, "<="),
        Gate("rounds_without_a_record", sum(each[0] for each in found), 0, "<="),
        Gate("requests_unanswered_for", sum(each[1] for each in found), 0, "<="),
        Gate("kills_after_which_no_round_was_finished", len(lost), 0, "<="),
        Gate("final_adapter_is_finite", float(finite), 1, ">="),
        Gate("accuracy_over_zero_shot", gain, 0.0, ">="),
    ]
    return rows, gates


def main() -> None:
    """Soak and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10, help="of each run")
    parser.add_argument("--pause", type=float, default=25.0, help="mean seconds between kills, beyond 20")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="keep everything in this folder, to look at")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    root = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(root.absolute(), [f"client-{number:03d}" for number in range(options.clients)])
    try:
        soak.provision()
        soak.start("server", "server", "up", "--server", str(soak.place.root))
        while (read_status(soak.place.root / "state") or {}).get("superlink") != "up":
            time.sleep(0.5)
        for site in soak.sites:
            soak.start(site, "client", "up", "--bundle", str(soak.root / site))
        soak.began = time.monotonic()
        orders = work(soak, options.minutes, options.rounds, options.seed, options.pause)
        rows, gates = judge(soak, orders, options.rounds, max(options.minutes * 60, soak.seconds))
    finally:
        soak.stop()
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    write_results(options.json, rows=rows, gates=gates)
    for gate in gates:
        print(f"{gate.name}: {gate.value:.3f} ({gate.sense} {gate.bound}{'' if gate.met else ', missed'})")


if __name__ == "__main__":
    main()
