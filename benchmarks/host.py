"""The language host at real size on one GPU: writes ``benchmarks/results/host.json``.

    python -m benchmarks.host [--tiny] [--minutes 8] [--only SECTION ...] [--skip SECTION ...]

LLaVA-1.5-7B's shape with random weights; ``--tiny`` runs the same code on a small model, on any machine. Clients are
processes of their own and reach the host over loopback with TLS. After each section the file is written, and a section
that fails is noted in it and passed over; one for which no time is left is left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import host_faults
import host_model
import host_wire
import torch
from host_gates import gates
from host_model import DEVICE, Shape
from results import judge_again, write_results

from fednano.host import HostLimits, HostSecurity, RemoteLLM, RunningHost, StaticTokens, new_token, serve
from fednano.host.bench import row_of
from fednano.host.drive import Drivers, Load
from fednano.host.loading import LINGER_SECONDS
from fednano.models.language import LocalLLM
from fednano.models.memory import DeviceMemory

RESULTS = Path(__file__).parent / "results" / "host.json"


@dataclass
class Bench:
    """One run.

    Attributes:
        shape: sizes.
        seconds: of a measured load.
        overload_seconds: of the overload.
        end: time at which no section is begun any more.
        path: of the results file.
        drivers: processes that play the clients.
        engine: what the rows are called that are measured now.
    """

    shape: Shape
    seconds: float
    overload_seconds: float
    end: float
    path: Path
    drivers: Drivers
    engine: str = "plain"
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.model = host_model.build(self.shape)
        self.part = host_model.part_of(self.model)
        self.llm = LocalLLM(self.part)
        self.llm.passes.warm_up()
        self.token = new_token()
        with tempfile.TemporaryDirectory() as folder:
            self.key, self.certificate = host_faults.self_signed(Path(folder))

    def add(self, *rows: dict[str, Any]) -> None:
        """Keep rows, show them, write the file."""
        for row in rows:
            self.rows.append(row)
            shown = {
                name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()
            }
            print(f"  {shown}", flush=True)
        write_results(self.path, rows=self.rows, gates=gates(self.rows, self.shape))

    @contextmanager
    def serve(self, *, batch: bool = True, limits: HostLimits | None = None) -> Iterator[RunningHost]:
        """A host of the model on this device, with TLS and a token, set up as `fednano host` does by default."""
        gpu = DEVICE.type == "cuda"
        with serve(
            self.llm,
            security=HostSecurity(self.certificate, self.key, verifier=StaticTokens([self.token])),
            limits=limits,
            batch_tokens=8192 if batch else 0,
            linger_seconds=LINGER_SECONDS if gpu else 0.0,
            grace=5.0,
        ) as host:
            yield host

    def load(self, host: RunningHost, clients: int = 1, length: int = 8) -> Load:
        """Clients of one sample each."""
        return Load(
            host.address,
            (length,) * clients,
            host_faults.pem(self.certificate),
            host_faults.pem(self.token),
            seconds=self.seconds,
            dtype=str(self.shape.dtype).removeprefix("torch."),
            answers=min(32, length // 4),
        )

    @contextmanager
    def connect(self, **options: Any) -> Iterator[RemoteLLM]:
        """A client in this process."""
        with (
            self.serve() as host,
            RemoteLLM(host.address, token=self.token, root_certificates=self.certificate, **options) as llm,
        ):
            yield llm


def passes(bench: Bench) -> None:
    """Passes in this process: short and long, few and many samples; and within a budget of memory."""
    short, middle, long = bench.shape.lengths
    for samples, length in ((1, short), (8, short), (8, middle), (1, long), (8, long), (16, long)):
        bench.add(_pass(bench, bench.llm, samples, length, bench.engine))
    if DEVICE.type == "cuda":
        budget = LocalLLM(bench.part, memory=DeviceMemory(DEVICE, int(bench.shape.budget_gb * 0.98e9)))
        budget.passes.warm_up()
        bench.add(_pass(bench, budget, 8, long, f"{bench.engine}, within {bench.shape.budget_gb:g} GB"))


def _pass(bench: Bench, llm: LocalLLM, samples: int, length: int, name: str) -> dict[str, Any]:
    return host_model.host_pass(bench.model, llm, bench.shape, samples, length, name, bench.seconds)


def kernels(bench: Bench) -> None:
    """Where the time of a pass goes, with blocks that are compiled if they have been before."""
    if DEVICE.type == "cuda":
        for samples, length in ((1, bench.shape.lengths[0]), (16, bench.shape.lengths[2])):
            bench.add(*host_model.kernels_of(bench.llm, bench.shape, samples, length, bench.engine))


def eager(bench: Bench) -> None:
    """The same batches by transformers alone."""
    for samples in (1, 4, 8, 16):
        bench.add(
            host_model.eager_pass(bench.model, bench.shape, samples, bench.shape.lengths[2], bench.seconds)
        )
        host_model.settle()


def clients(bench: Bench) -> None:
    """Throughput against clients and lengths; and eight clients one at a time."""
    with bench.serve(batch=False) as host:
        for length in bench.shape.lengths:
            _drive(bench, host, bench.load(host, 8, length), "one at a time")
    with bench.serve() as host:
        for length in bench.shape.lengths:
            for count in bench.shape.clients:
                _drive(bench, host, bench.load(host, count, length), "together")


def _drive(bench: Bench, host: RunningHost, load: Load, name: str) -> None:
    before = host.stats()
    found = bench.drivers.run(load)
    after = host.stats()
    done = max(sum(map(len, found.steps)), 1)
    bench.add(
        {
            "section": "clients",
            "name": name,
            "engine": bench.engine,
            **row_of(load, found),
            "errors": len(found.errors),
            "passes_per_step": (after.get("batches", 0) - before.get("batches", 0)) / done,
            "pass_ms": _pass_ms(before, after),
            "bytes_per_step": (found.sent + found.received) / done,
        }
    )


def _pass_ms(before: dict[str, int], after: dict[str, int]) -> float:
    """Mean time of a pass."""
    spent, count = (after.get(name, 0) - before.get(name, 0) for name in ("pass_milliseconds", "batches"))
    return spent / max(count, 1)


def whole_path(bench: Bench) -> None:
    """Eight clients over TLS beside the same batch in this process, in turn."""
    for length in (bench.shape.lengths[2], bench.shape.lengths[0]):
        with bench.serve() as host:
            load = replace(bench.load(host, 8, length), seconds=2 * bench.seconds)
            if bench.llm.passes.graphs is not None:
                bench.drivers.run(load)  # sizes are recorded when they come; that is not what is measured
            for turn in range(3):
                one = _pass(bench, bench.llm, 8, length, f"{bench.engine}, beside the path")
                before = host.stats()
                driven = bench.drivers.run(load)
                bench.add(
                    {
                        "section": "path",
                        "engine": bench.engine,
                        "turn": turn,
                        "tokens": length,
                        "in_process": one["samples_per_second"],
                        "over_tls": driven.rate(),
                        "ratio": driven.rate() / one["samples_per_second"],
                        "pass_ms": _pass_ms(before, host.stats()),
                        "errors": len(driven.errors),
                    }
                )


def wire(bench: Bench) -> None:
    """Bytes of each exchange."""
    bench.add(*host_wire.exchanges(bench.shape, bench.connect, bench.model.lm_head))


def client(bench: Bench) -> None:
    """Memory and seconds of a client."""
    bench.add(*host_wire.client_memory(bench.shape, bench.model))


def right(bench: Bench) -> None:
    """Many clients at once, every gradient compared."""
    with bench.serve() as host:
        load = bench.load(host)
        bench.add(
            host_faults.correctness(bench.drivers, bench.llm, bench.shape, load, max(bench.shape.clients))
        )


def faults(bench: Bench) -> None:
    """Lost clients, full memory, overload."""
    common = bench.llm, bench.shape
    with bench.serve() as host:
        load = bench.load(host)
        bench.add(host_faults.client_gone(host, bench.drivers, *common, load))
        row = host_faults.out_of_memory(host, bench.drivers, *common, load)
        if row is not None:
            bench.add(row)
    bench.add(host_faults.overload(bench.serve, bench.drivers, *common, bench.load, bench.overload_seconds))


def compiled(bench: Bench) -> None:
    """Passes, path and clients again with compiled blocks."""
    bench.engine = "compiled"
    began = time.monotonic()
    bench.llm = LocalLLM(bench.part, compiled=True)
    bench.llm.passes.warm_up()
    bench.add({"section": "compile", "seconds": time.monotonic() - began})
    passes(bench)
    if bench.end - time.monotonic() < 60 and DEVICE.type != "cpu":
        return
    whole_path(bench)
    _some_clients(bench)


def _some_clients(bench: Bench) -> None:
    short, _, long = bench.shape.lengths
    with bench.serve() as host:
        for length in (short, long):
            for count in (1, 8, 64):
                if bench.llm.passes.graphs is not None:
                    bench.drivers.run(bench.load(host, count, length))
                _drive(bench, host, bench.load(host, count, length), "together")


def graphs(bench: Bench) -> None:
    """Path, clients and right gradients again with passes that are recorded as CUDA graphs, compiled if they have been
    before."""
    if DEVICE.type != "cuda":
        return
    plain, engine = bench.llm, bench.engine
    bench.llm, bench.engine = LocalLLM(bench.part, graphs=True), f"{engine}, CUDA graphs"
    try:
        bench.llm.passes.warm_up()
        whole_path(bench)
        _some_clients(bench)
        with bench.serve() as host:
            # The same few lengths again and again, so that most passes are replayed.
            load = replace(bench.load(host), lengths=bench.shape.lengths * 4, steps=8)
            name = f"{len(load.lengths)} clients, CUDA graphs"
            row = host_faults.compared(bench.drivers, plain, bench.shape, load, name)
        recorded = bench.llm.passes.graphs
        assert recorded is not None
        bench.add({**row, "recorded": len(recorded), "recorded_gb": recorded.held / 1e9})
        recorded.let_go()
    finally:
        bench.llm, bench.engine = plain, engine


SECTIONS: dict[str, tuple[Callable[[Bench], None], float]] = {
    # name: (what, seconds that it takes on one H100, about)
    "eager": (eager, 20),
    "passes": (passes, 25),
    "whole-path": (whole_path, 35),
    "clients": (clients, 100),
    "wire": (wire, 20),
    "right": (right, 25),
    "client": (client, 20),
    "faults": (faults, 100),
    # Last, because blocks that were compiled stay so for all that comes after.
    "compiled": (compiled, 100),
    "graphs": (graphs, 75),
    # After all that is timed: a profiler that has been in a process slows every launch of a kernel from then on.
    "kernels": (kernels, 8),
}


def main() -> int:
    """Run what is asked for; 0 if no section failed, whatever the gates say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small model, for any machine")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no section that would end later")
    parser.add_argument("--seconds", type=float, help="of each measured load (2.5; 0.5 with --tiny)")
    parser.add_argument("--overload", type=float, help="seconds of the overload (60; 6 with --tiny)")
    parser.add_argument("--clients", type=int, nargs="+", help="numbers of clients (1 2 4 8 16 32 64)")
    parser.add_argument("--processes", type=int, default=8, help="that play the clients")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--skip", nargs="+", choices=SECTIONS, default=[])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--judge", action="store_true", help="measure nothing: read the gates off --json again"
    )
    options = parser.parse_args()
    if options.judge:
        judge_again(options.json, lambda rows: gates(rows, host_model.FULL))
        return 0
    if DEVICE.type == "cpu" and not options.tiny:
        print("the full size needs a GPU, and torch sees none; --tiny runs the same code here")
        return 2
    start = time.monotonic()
    torch.set_num_threads(1 if DEVICE.type == "cpu" else 4)
    with Drivers(2 if options.tiny else options.processes) as drivers:
        shape = host_model.TINY if options.tiny else host_model.FULL
        bench = Bench(
            replace(shape, clients=tuple(options.clients)) if options.clients else shape,
            options.seconds or (0.5 if options.tiny else 2.5),
            options.overload or (6.0 if options.tiny else 60.0),
            start + 60 * options.minutes,
            options.json,
            drivers,
        )
        print(f"built in {time.monotonic() - start:.0f} s on {DEVICE}", flush=True)
        failed = work_off(bench, [name for name in options.only if name not in options.skip])
    for gate in gates(bench.rows, bench.shape):
        print(
            f"{'ok    ' if gate.met else 'MISSED'} {gate.name}: {gate.value:.4g} {gate.sense} {gate.bound:g}"
        )
    return 1 if failed else 0


def work_off(bench: Bench, names: Sequence[str]) -> list[str]:
    """Run sections one after the other while there is time; the names of those that failed."""
    failed: list[str] = []
    for name in names:
        run, expected = SECTIONS[name]
        at = time.monotonic()
        if DEVICE.type != "cpu" and at + 0.6 * expected > bench.end:
            print(f"{name}: left out, no time is left", flush=True)
            bench.add({"section": "left out", "name": name})
            continue
        print(f"{name}:", flush=True)
        try:
            run(bench)
        except Exception as error:
            failed.append(name)
            traceback.print_exc()
            bench.add({"section": "failed", "name": name, "error": f"{type(error).__name__}: {error}"[:500]})
        host_model.settle()
        print(f"{name}: {time.monotonic() - at:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
