"""Search the block sizes on this card and rewrite its rows of the kernels' table.

Candidates are compiled by several processes at once, into Triton's cache on disk, and timed by one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fednano_kernels import _tuning

from benchmarks.kernels_timing import measure
from benchmarks.kernels_tune_jobs import Config, all_jobs


@dataclass(frozen=True)
class _Part:
    """Candidates of one job that one process tries, in order."""

    job: str
    configs: list[Config]


def _try(part: _Part) -> tuple[_Part, list[Config], str]:
    """In a process of its own: compile and run each candidate once.

    Returns:
        the part, the candidates that ran, and how the next one failed ("" if none did). A failure on the device leaves
        the process unable to go on, so the rest is for another one.
    """
    ran: list[Config] = []
    try:
        kernel, _, make = all_jobs()[part.job]
        run, _ = make()
        for config in part.configs:
            with _tuning.forced(**{kernel: config}):
                run(0)
                torch.cuda.synchronize()
            ran.append(config)
    except Exception as error:
        return part, ran, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return part, ran, ""


def _survivors(parts: list[_Part], lines: list[str]) -> dict[str, list[Config]]:
    """By job, the candidates that compile and run; the others are written to ``lines``."""
    alive: dict[str, list[Config]] = {part.job: [] for part in parts}
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=1) as pool:
        while parts:
            rest = []
            for part, ran, failure in pool.imap_unordered(_try, parts):
                alive[part.job] += ran
                if failure:
                    lines.append(f"{part.job} {part.configs[len(ran)]}: {failure}")
                    print(f"  {lines[-1]}")
                    if part.configs[len(ran) + 1 :]:
                        rest.append(_Part(part.job, part.configs[len(ran) + 1 :]))
            parts = rest
    return alive


def tune(path: Path, only: str = "", log: Path | None = None) -> None:
    """Time every candidate of every job whose name contains a word of ``only`` (by commas); the best go into the table.

    The table is read again after every job, because later jobs build on earlier ones.
    """
    jobs = {name: job for name, job in all_jobs().items() if any(part in name for part in only.split(","))}
    lines: list[str] = []
    parts = [
        _Part(name, configs[i::2])
        for name, (_, configs, _) in jobs.items()
        for i in range(2)
        if configs[i::2]
    ]
    alive = _survivors(parts, lines)
    print(f"{sum(map(len, alive.values()))} candidates of {len(jobs)} jobs run")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    card = table.setdefault(torch.cuda.get_device_name(0), {"kernels": {}})
    card["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(0))
    for name, (kernel, _, make) in jobs.items():
        run, sets = make()
        _tuning.asked.clear()
        times: list[tuple[float, Config]] = []
        for config in alive[name]:
            with _tuning.forced(**{kernel: config}):
                try:
                    found = measure({"x": run}, sets, graph=True, rounds=3, window_ms=1.0)
                except Exception as error:
                    lines.append(f"{name} {config}: {type(error).__name__}")
                    continue
                if "x" in found:
                    times.append((found["x"], config))
        if not times:
            continue
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
