"""Timing on one GPU: variants interleaved, medians, inputs rotated past the cache, with and without CUDA graphs."""

from __future__ import annotations

import functools
import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Variant = Callable[[int], Any]  # runs the operation on input set i
FLUSH_BYTES = 256 << 20  # input sets together exceed the cache of any card this was written for


def sets_for(bytes_per_set: int) -> int:
    """How many input sets to rotate so that none is still in the cache when its turn comes again."""
    return max(2, min(16, -(-FLUSH_BYTES // max(bytes_per_set, 1))))


def _capture(run: Variant, sets: int) -> Callable[[], None]:
    """One graph that runs every set once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _call(run, sets)
    return graph.replay


def _call(run: Variant, sets: int) -> None:
    for i in range(sets):
        run(i)


def measure(
    variants: Mapping[str, Variant], sets: int, *, graph: bool, rounds: int = 11, window_ms: float = 4.0
) -> dict[str, float]:
    """Median milliseconds of one call of each variant; a variant that cannot run this way is left out.

    Args:
        variants: name -> function of the number of the input set.
        sets: how many input sets there are.
        graph: replay a captured graph (device time) instead of calling from Python (what a user of plain torch sees).
        rounds: each variant is timed once a round, in turn.
        window_ms: calls are repeated until one timing lasts about this long.
    """
    bodies: dict[str, Callable[[], None]] = {}
    repeats: dict[str, int] = {}
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def once(name: str) -> float:
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats[name]):
            bodies[name]()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / (repeats[name] * sets)

    for name, run in variants.items():
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for i in (*range(sets), *range(sets)):
                    run(i)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            if graph:
                bodies[name] = _capture(run, sets)
            else:
                bodies[name] = functools.partial(_call, run, sets)
        except Exception as error:
            print(
                f"  {name} left out ({'graph' if graph else 'eager'}): {type(error).__name__}: {str(error)[:300]}"
            )
            bodies.pop(name, None)
            torch.cuda.synchronize()
            continue
        repeats[name] = 1
        once(name)
        repeats[name] = max(1, round(window_ms / max(once(name) * sets, 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(rounds):
        for name in bodies:
            times[name].append(once(name))
    bodies.clear()
    gc.collect()
    return {name: statistics.median(values) for name, values in times.items()}


def peak_extra(run: Callable[[], object]) -> int:
    """Bytes of device memory that ``run`` needs at its peak, beyond what is there before it."""
    run()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, counting both the read and the write."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = measure({"copy": lambda _: target.copy_(source)}, 1, graph=False)["copy"]
    return 2 * source.nbytes / milliseconds * 1e3


def product_rate() -> float:
    """Floating-point operations a second of an 8192^3 bfloat16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    milliseconds = measure({"mm": lambda _: torch.mm(a, b, out=out)}, 1, graph=False)["mm"]
    return float(2 * 8192**3 / milliseconds * 1e3)


def card() -> dict[str, Any]:
    """Driver, clocks and limits as nvidia-smi reads them under load; empty where it is absent."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        for _ in range(50):
            torch.mm(a, a)
        torch.cuda.current_stream().query()
        if time.monotonic() > until - 0.1:
            break
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    finally:
        torch.cuda.synchronize()
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(fields, values, strict=True))
