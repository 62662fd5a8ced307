"""Search the block sizes on this card and rewrite its rows of the kernels' table.

Candidates are compiled by several processes at once, into Triton's cache on disk, and timed by one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fednano_kernels import _tuning, adapter_grad_fisher, nano_adapter

from benchmarks.kernels_adapters import FISHER_SHAPES, NANO_SHAPES, randn
from benchmarks.kernels_timing import Variant, measure, sets_for

Config = dict[str, int]
Make = Callable[[], tuple[Variant, int]]  # the timed function and its number of input sets


def _grid(**axes: tuple[int, ...]) -> list[Config]:
    configs: list[Config] = [{}]
    for name, values in axes.items():
        configs = [{**config, name: value} for config in configs for value in values]
    return configs


def _shrink_expand(r: int) -> list[Config]:
    found = _grid(BLOCK_M=(16,), BLOCK_K=(128, 256), num_warps=(4,), STAGES=(3, 4))
    found += _grid(BLOCK_M=(32,), BLOCK_K=(128, 256), num_warps=(4, 8), STAGES=(2, 3, 4))
    found += _grid(BLOCK_M=(64,), BLOCK_K=(64, 128), num_warps=(4, 8), STAGES=(3, 4))
    found += _grid(BLOCK_M=(128,), BLOCK_K=(64,), num_warps=(8,), STAGES=(3, 4))
    return [c for c in found if c["STAGES"] * (c["BLOCK_M"] + max(r, 16)) * c["BLOCK_K"] * 2 <= 160 << 10]


def _weight_grad(r: int) -> list[Config]:
    found = _grid(BLOCK_M=(64, 128), BLOCK_K=(64,), SPLITS=(4, 8), num_warps=(4,), STAGES=(3, 4))
    found += _grid(BLOCK_M=(32, 64), BLOCK_K=(128,), SPLITS=(4, 8, 16), num_warps=(4,), STAGES=(3, 4))
    found += _grid(BLOCK_M=(64,), BLOCK_K=(128,), SPLITS=(8, 16), num_warps=(8,), STAGES=(3,))
    return [c for c in found if c["STAGES"] * (c["BLOCK_K"] + max(r, 16)) * c["BLOCK_M"] * 2 <= 160 << 10]


def _jobs() -> dict[str, tuple[str, list[Config], Make]]:
    """name -> (kernel, candidates, how to make the timed function and its number of input sets)."""
    jobs: dict[str, tuple[str, list[Config], Make]] = {}

    def nano(m: int, d: int, r: int, backward: bool) -> Make:
        def make() -> tuple[Variant, int]:
            sets = sets_for(m * d * 2 * 2)
            a, b = randn(d, r, scale=d**-0.5), randn(r, d)
            xs = [randn(m, d) for _ in range(sets)]
            if not backward:
                return lambda i: nano_adapter(xs[i], a, b, 1.0, "gelu"), sets
            z = randn(m, r)
            op = torch.ops.fednano.nano_adapter_backward
            return lambda i: op(xs[i], xs[i], z, a, b, 1.0, "gelu", True, False), sets

        return make

    def gradient(m: int, d: int, r: int) -> Make:
        def make() -> tuple[Variant, int]:
            from fednano_kernels import _weight_grad_triton as wg

            sets = sets_for(m * d * 4)
            xs, ys, z = [randn(m, d) for _ in range(sets)], [randn(m, d) for _ in range(sets)], randn(m, r)
            da, db = randn(d, r), randn(r, d)
            return lambda i: wg.gradients(wg.Product(xs[i], z, da), wg.Product(ys[i], z, db.T)), sets

        return make

    def fisher(n: int, t: int, p: int, q: int) -> Make:
        def make() -> tuple[Variant, int]:
            sets = sets_for(n * t * p * 2)
            xs, g = [randn(n, t, p) for _ in range(sets)], randn(n, t, q)
            return lambda i: adapter_grad_fisher(xs[i], g), sets

        return make

    def plain(n: int, t: int, p: int, q: int) -> Make:
        def make() -> tuple[Variant, int]:
            from fednano_kernels import _weight_grad_triton as wg

            sets = sets_for(n * t * p * 2)
            xs, g, out = [randn(n * t, p) for _ in range(sets)], randn(n * t, q), randn(p, q)
            return lambda i: wg.gradients(wg.Product(xs[i], g, out)), sets

        return make

    def loss(v: int, objective: str) -> Make:
        def make() -> tuple[Variant, int]:
            from fednano_kernels import _token_loss_triton as tt

            logits, labels = randn(2048, v), torch.randint(0, v, (2048,), device="cuda")
            return lambda i: tt.losses_and_gradients(logits, labels, None, objective, 0.1, True), 1

        return make

    for m, d, r in NANO_SHAPES:
        jobs[f"forward {m} {d} {r}"] = ("shrink_expand", _shrink_expand(r), nano(m, d, r, False))
        jobs[f"backward {m} {d} {r}"] = ("shrink_expand", _shrink_expand(r), nano(m, d, r, True))
        jobs[f"gradient {m} {d} {r}"] = ("weight_grad", _weight_grad(r), gradient(m, d, r))
    for shape in FISHER_SHAPES:
        jobs[f"fisher {shape}"] = ("weight_grad_fisher", _weight_grad(shape[3]), fisher(*shape))
        jobs[f"plain {shape}"] = ("weight_grad", _weight_grad(shape[3]), plain(*shape))
    losses = _grid(BLOCK=(4096, 8192), num_warps=(8, 16), STAGES=(1, 2, 3))
    for v in (32000, 128256):
        for objective in ("inverted_hinge", "cross_entropy"):
            jobs[f"loss {v} {objective}"] = ("token_loss", losses, loss(v, objective))
    return jobs


def _compile(part: tuple[str, list[Config]]) -> int:
    """In a worker: compile these candidates of one job into the cache on disk."""
    name, configs = part
    kernel, _, make = _jobs()[name]
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
    """Time every candidate of every job whose name contains ``only``; merge the best into the table at ``path``."""
    jobs = {name: job for name, job in _jobs().items() if only in name}
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
        key = _tuning.asked[kernel]
        card["kernels"].setdefault(kernel, {})[key] = times[0][1]
        middle = statistics.median(t for t, _ in times)
        print(
            f"{name:32} {key:36} best {times[0][0] * 1e3:7.1f} us, median {middle * 1e3:7.1f}: {times[0][1]}"
        )
        lines += [f"{name} {key} {t * 1e3:.1f} us {c}" for t, c in times]
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if log is not None:
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")
