"""Speed and memory of merging, against Flower's FedAvg and against dense algebra.

    python benchmarks/aggregation.py            # everything, minutes
    python benchmarks/aggregation.py --quick    # fewer updates, no dense reference, nothing written

Times are CPU time of one thread, so that other work on the machine disturbs them little; ratios are medians
over interleaved repetitions. Memory is the rise of the process's peak resident size, in updates of 1 MB (float32).

What is measured is a process that has merged for a while: with the compiled loops, which are loaded before.
The same with torch alone stands beside it (`fedavg_torch`, `fisher_torch`), and so does what loading them costs once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from results import Gate, write_results

from fednano.aggregation import (
    LeafSpec,
    Leaves,
    Product,
    Spec,
    State,
    Update,
    codec_names,
    create_codec,
    create_rule,
    encode_fisher,
    validate,
)
from fednano.aggregation.products import merged_products

RESULTS = Path(__file__).parent / "results" / "aggregation.json"
WIDTH, RANK = 2048, 32  # two NanoAdapter sites: 262,144 elements, 1 MiB in float32
UPDATE_BYTES = 4 * 4 * WIDTH * RANK


def adapter_spec(clients: int) -> Spec:
    """Two NanoAdapters of 1 MiB together."""
    leaves, products = {}, {}
    for site in ("image", "text"):
        leaves[f"{site}.A"], leaves[f"{site}.B"] = LeafSpec((WIDTH, RANK)), LeafSpec((RANK, WIDTH))
        products[site] = Product(f"{site}.A", f"{site}.B")
    return Spec(leaves=leaves, products=products, max_clients=clients)


def pool_of(spec: Spec, count: int) -> list[tuple[Leaves, Leaves]]:
    """Distinct leaves and Fishers, ``count`` of each."""
    draw = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        leaves = {n: 0.05 * torch.randn(s.shape, generator=draw) for n, s in spec.leaves.items()}
        fisher = {n: torch.rand(s.shape, generator=draw).pow(4) for n, s in spec.leaves.items()}
        out.append((leaves, fisher))
    return out


def updates_of(pool: list[tuple[Leaves, Leaves]], count: int, fisher: bool, copy: bool) -> Iterator[Update]:
    """A stream of updates; copies, if asked, live no longer than their turn, as a received message does."""
    for k in range(count):
        leaves, info = pool[k % len(pool)]
        yield Update(
            client=f"client-{k}",
            round=1,
            weight=100.0 + k % 400,
            leaves={n: t.clone() for n, t in leaves.items()} if copy else leaves,
            fisher=({n: t.clone() for n, t in info.items()} if copy else info) if fisher else None,
        )


def merge(rule: str, spec: Spec, stream: Iterator[Update]) -> Leaves:
    """Validate and merge a stream."""
    chosen = create_rule(rule)
    state: State = chosen.init(spec, round=1)
    for update in stream:
        validate(update, spec, round=1, values=False)  # the accumulators check every value
        chosen.add(state, update)
        del update  # or it would live until the next one is whole
    return chosen.finish(state)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of CPU time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def status_bytes(key: str) -> int:
    """One size of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not tell {key}; run on Linux")


def measure_memory(rule: str, count: int) -> dict[str, Any]:
    """Peak resident size while merging ``count`` updates, above the start."""
    spec = adapter_spec(count)
    pool = pool_of(spec, 8)
    merge(rule, spec, updates_of(pool, 8, rule == "fisher", copy=True))  # code paths and allocator are warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed must not hide what is measured
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    start, began = status_bytes("VmRSS"), time.process_time()
    merge(rule, spec, updates_of(pool, count, rule == "fisher", copy=True))
    seconds = time.process_time() - began
    return {
        "measure": "memory",
        "rule": rule,
        "updates": count,
        "peak_updates": (status_bytes("VmHWM") - start) / UPDATE_BYTES,
        "cpu_seconds": seconds,
    }


LOAD = """
import json, os, resource, time
import torch
from fednano.aggregation import native
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
start, began = resident(), time.process_time()
if native.chosen(1):
    native.loop_for("add", torch.zeros(1).numpy())
    native.loop_for("add_pair", torch.zeros(1).numpy(), torch.zeros(1).numpy())
print(json.dumps({"cpu_seconds": time.process_time() - began, "resident_mb": (resident() - start) / 1e6}))
"""


def measure_loading() -> list[dict[str, Any]]:
    """What the compiled loops cost a process once: with numba's cache on disk still empty, and filled."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "filled"):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "FEDNANO_NATIVE": "on"}
            done = subprocess.run(
                [sys.executable, "-c", LOAD], capture_output=True, text=True, check=True, env=environment
            )
            rows.append({"measure": "loading", "cache": cache, **json.loads(done.stdout)})
    return rows


def with_torch(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same without compiled loops."""

    def run() -> Any:
        os.environ["FEDNANO_NATIVE"] = "off"
        try:
            return work()
        finally:
            os.environ["FEDNANO_NATIVE"] = "on"

    return run


def measure_speed(held: int, repeats: int) -> list[dict[str, Any]]:
    """Per update: Flower's FedAvg, ours, and Fisher, interleaved on the same arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    spec = adapter_spec(held)
    pool = pool_of(spec, held)
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({n: Array(t.numpy()) for n, t in leaves.items()}),
                "metrics": MetricRecord({"num-examples": 100.0 + k % 400}),
            }
        )
        for k, (leaves, _) in enumerate(pool)
    ]
    contenders: dict[str, Callable[[], Any]] = {
        "flower_fedavg": lambda: aggregate_arrayrecords(records, "num-examples"),
        "fedavg": lambda: merge("fedavg", spec, updates_of(pool, held, fisher=False, copy=False)),
        "fisher": lambda: merge("fisher", spec, updates_of(pool, held, fisher=True, copy=False)),
    }
    contenders |= {f"{rule}_torch": with_torch(contenders[rule]) for rule in ("fedavg", "fisher")}
    contenders["fisher"]()  # the loops are loaded
    mine, theirs = contenders["fedavg"](), contenders["flower_fedavg"]()
    worst = max(float((mine[n] - torch.from_numpy(theirs[n].numpy())).abs().max()) for n in mine)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, work in contenders.items():
            times[name].append(timed(work) / held)
    rows: list[dict[str, Any]] = []
    for name, measured in times.items():
        base = times["flower_fedavg"]
        rows.append(
            {
                "measure": "speed",
                "rule": name,
                "updates": held,
                "milliseconds_per_update": 1e3 * statistics.median(measured),
                "times_faster_than_flower": statistics.median(
                    b / m for b, m in zip(base, measured, strict=True)
                ),
                "times_slower_than_fedavg": statistics.median(
                    m / f for m, f in zip(measured, times["fedavg"], strict=True)
                ),
                "largest_difference_from_flower": worst,
            }
        )
    return rows


def measure_products(clients: int, rank: int, width: int, dense: bool) -> dict[str, Any]:
    """The product average by QR, and by dense matrices and their SVD, both in float64."""
    draw = torch.Generator().manual_seed(1)
    spec = Spec(
        {"q.A": LeafSpec((rank, width)), "q.B": LeafSpec((width, rank))},
        products={"q": Product("q.B", "q.A", 2.0)},
        max_clients=clients,
    )
    updates = []
    for k in range(clients):
        leaves = {n: torch.randn(s.shape, generator=draw) / math.sqrt(width) for n, s in spec.leaves.items()}
        updates.append(Update(f"client-{k}", 1, 1.0 + k, leaves))
    total = math.fsum(u.weight for u in updates)
    weights = [u.weight / total for u in updates]
    began = time.process_time()
    merged, _ = merged_products(spec, updates, weights)
    ours = time.process_time() - began
    row: dict[str, Any] = {
        "measure": "product_average",
        "clients": clients,
        "rank": rank,
        "width": width,
        "cpu_seconds": ours,
    }
    if dense:
        began = time.process_time()
        mean = torch.zeros(width, width, dtype=torch.float64)
        for w, u in zip(weights, updates, strict=True):
            mean += w * 2.0 * (u.leaves["q.B"].double() @ u.leaves["q.A"].double())
        left, values, right = torch.linalg.svd(mean)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        row["dense_cpu_seconds"] = time.process_time() - began
        row["share_of_dense_time"] = ours / row["dense_cpu_seconds"]
        got = 2.0 * merged["q.B"].double() @ merged["q.A"].double()
        row["largest_difference_from_dense"] = float((got - best).abs().max() / best.abs().max())
    return row


def measure_bytes() -> list[dict[str, Any]]:
    """Payload of one update with each codec."""
    spec = adapter_spec(1)
    leaves, fisher = pool_of(spec, 1)[0]
    zero = {n: torch.zeros_like(t) for n, t in leaves.items()}
    rows: list[dict[str, Any]] = []
    for name in codec_names():
        codec = create_codec(name)
        began = time.process_time()
        payloads, _ = codec.encode(leaves, zero)
        encoded = time.process_time() - began
        codec.decode(payloads, zero)
        size = sum(p.numel() for p in payloads.values())
        rows.append(
            {
                "measure": "bytes",
                "codec": name,
                "bytes": size,
                "share_of_float32": size / UPDATE_BYTES,
                "encode_milliseconds": 1e3 * encoded,
                "decode_milliseconds": 1e3 * (time.process_time() - began - encoded),
            }
        )
    size = sum(p.numel() for p in encode_fisher(fisher).values())
    rows.append(
        {"measure": "bytes", "codec": "fisher-8bit", "bytes": size, "share_of_float32": size / UPDATE_BYTES}
    )
    return rows


def main() -> None:
    """Measure, print, and write the results file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer updates, no dense reference, nothing written"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    os.environ["FEDNANO_NATIVE"] = "on"
    count, held, repeats = (300, 32, 3) if quick else (10_000, 256, 9)
    memory = measure_memory("fedavg", count)
    fisher_memory = measure_memory("fisher", max(count // 10, 100))
    speed = [*measure_speed(held, repeats), *measure_loading()]
    products = measure_products(100, 16, 1024 if quick else 4096, dense=not quick)
    sizes = measure_bytes()
    rows = [memory, fisher_memory, *speed, products, *sizes]
    for row in rows:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if quick:
        return
    by = {row["rule"]: row for row in speed if row["measure"] == "speed"}
    share = {row["codec"]: row["share_of_float32"] for row in sizes}
    gates = [
        Gate("peak_memory_updates", memory["peak_updates"], 4.0, "<="),
        Gate("fedavg_times_faster_than_flower", by["fedavg"]["times_faster_than_flower"], 2.0, ">="),
        Gate("fisher_times_slower_than_fedavg", by["fisher"]["times_slower_than_fedavg"], 1.6, "<="),
        Gate("product_average_share_of_dense_time", products["share_of_dense_time"], 0.1, "<="),
        Gate("int8_share_of_float32", share["int8"], 0.30, "<="),
        Gate("int4_share_of_float32", share["int4"], 0.17, "<="),
        Gate("sign_share_of_float32", share["sign"], 0.06, "<="),
    ]
    write_results(RESULTS, rows=rows, gates=gates)
    for gate in gates:
        print(f"{'met   ' if gate.met else 'MISSED'} {gate.name}: {gate.value:.4g} {gate.sense} {gate.bound}")


if __name__ == "__main__":
    main()
