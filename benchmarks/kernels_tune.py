"""Search the block sizes on this card and rewrite its rows of the kernels' table.

Candidates are compiled by several processes at once, into Triton's cache on disk, and timed by one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from fednano_kernels import _tuning

from benchmarks.kernels_timing import measure
from benchmarks.kernels_tune_jobs import Config, all_jobs


def _compile(part: tuple[str, list[Config]]) -> int:
    """In a worker: compile these candidates of one job into the cache on disk."""
    name, configs = part
    kernel, _, make = all_jobs()[name]
    run, _ = make()
    done = 0
    for config in configs:
        with _tuning.forced(**{kernel: config}):
            try:
                run(0)
                torch.cuda.synchronize()
                done += 1
            except Exception:
                continue
    return done


def tune(path: Path, only: str = "", log: Path | None = None) -> None:
    """Time every candidate of every job whose name contains ``only``; merge the best into the table at ``path``.

    The table is read again after every job, because later jobs build on earlier ones.
    """
    jobs = {name: job for name, job in all_jobs().items() if only in name}
    parts = [
        (name, configs[i::3]) for name, (_, configs, _) in jobs.items() for i in range(3) if configs[i::3]
    ]
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        compiled = sum(pool.map(_compile, parts, chunksize=1))
    print(f"compiled {compiled} candidates of {len(jobs)} jobs")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    card = table.setdefault(torch.cuda.get_device_name(0), {"kernels": {}})
    card["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(0))
    lines = []
    for name, (kernel, configs, make) in jobs.items():
        run, sets = make()
        _tuning.asked.clear()
        times: list[tuple[float, Config]] = []
        for config in configs:
            with _tuning.forced(**{kernel: config}):
                try:
                    found = measure({"x": run}, sets, graph=True, rounds=3, window_ms=1.0)
                except Exception as error:
                    lines.append(f"{name} {config}: {type(error).__name__}")
                    continue
                if "x" in found:
                    times.append((found["x"], config))
        times.sort(key=lambda entry: entry[0])
        keys = sorted(_tuning.asked.pop(kernel))
        key = " ".join(keys)
        card["kernels"].setdefault(kernel, {}).update(dict.fromkeys(keys, times[0][1]))
        middle = statistics.median(t for t, _ in times)
        print(
            f"{name:32} {key:36} best {times[0][0] * 1e3:7.1f} us, median {middle * 1e3:7.1f}: {times[0][1]}"
        )
        lines += [f"{name} {key} {t * 1e3:.1f} us {c}" for t, c in times]
        path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        _tuning.reload()
    if log is not None:
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")
