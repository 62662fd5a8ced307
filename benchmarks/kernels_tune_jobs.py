"""What the tuner searches: for every kernel, the shapes and the candidates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fednano_kernels import (
    Support,
    adapter_grad_fisher,
    flat_adamw_,
    grouped_adapter,
    lora_linear,
    nano_adapter,
    scatter_delta,
)

from benchmarks.kernels_adapters import FISHER_SHAPES, NANO_SHAPES, randn
from benchmarks.kernels_lora import CLIENTS, LORA_SHAPES, TOKENS, WIDTH
from benchmarks.kernels_sparse import ENTRIES, SCATTER_ROWS
from benchmarks.kernels_timing import Variant, sets_for

Config = dict[str, int]
Make = Callable[[], tuple[Variant, int]]  # the timed function and its number of input sets
SHARED_LIMIT = 200 << 10


def grid(**axes: tuple[int, ...]) -> list[Config]:
    """Every combination of the values."""
    configs: list[Config] = [{}]
    for name, values in axes.items():
        configs = [{**config, name: value} for config in configs for value in values]
    return configs


def _sweeps(r: int) -> list[Config]:
    """Candidates of shrink_expand: small row blocks with deep pipelines, and large ones that read P and Q less."""
    found = grid(BLOCK_M=(16,), BLOCK_K=(256,), num_warps=(4,), STAGES=(4, 6, 8))
    found += grid(BLOCK_M=(32,), BLOCK_K=(128,), num_warps=(4,), STAGES=(4, 8))
    found += grid(BLOCK_M=(32,), BLOCK_K=(256,), num_warps=(4, 8), STAGES=(3, 4, 6))
    found += grid(BLOCK_M=(64,), BLOCK_K=(128,), num_warps=(4, 8), STAGES=(3, 4, 5))
    found += grid(BLOCK_M=(64,), BLOCK_K=(256,), num_warps=(4, 8), STAGES=(2, 3, 4))
    found += grid(BLOCK_M=(128,), BLOCK_K=(128,), num_warps=(8,), STAGES=(2, 3))
    return [c for c in found if c["STAGES"] * (c["BLOCK_M"] + max(r, 16)) * c["BLOCK_K"] * 2 <= SHARED_LIMIT]


def _gradients(r: int) -> list[Config]:
    found = grid(BLOCK_M=(128,), BLOCK_K=(64,), SPLITS=(1, 2, 4, 8), num_warps=(4,), STAGES=(3, 4))
    found += grid(BLOCK_M=(32, 64), BLOCK_K=(128,), SPLITS=(1, 2, 4, 8), num_warps=(4,), STAGES=(3, 4))
    found += grid(BLOCK_M=(64,), BLOCK_K=(128,), SPLITS=(4, 8), num_warps=(8,), STAGES=(3,))
    return [c for c in found if c["STAGES"] * (c["BLOCK_K"] + max(r, 16)) * c["BLOCK_M"] * 2 <= SHARED_LIMIT]


def _loss_tiles() -> list[Config]:
    found = grid(BLOCK=(4096,), num_warps=(8,), STAGES=(1, 2, 3, 4))
    found += grid(BLOCK=(8192,), num_warps=(8, 16, 32), STAGES=(1, 3, 4))
    found += grid(BLOCK=(16384,), num_warps=(16, 32), STAGES=(1, 3))
    return found


def _nano(m: int, d: int, r: int, backward: bool) -> Make:
    def make() -> tuple[Variant, int]:
        sets = sets_for(m * d * 4)
        a, b, z = randn(d, r, scale=d**-0.5), randn(r, d), randn(m, r)
        xs = [randn(m, d) for _ in range(sets)]
        op = torch.ops.fednano.nano_adapter_backward
        if backward:
            return lambda i: op(xs[i], xs[i], z, a, b, 1.0, "gelu", True, False), sets
        return lambda i: nano_adapter(xs[i], a, b, 1.0, "gelu"), sets

    return make


def _low_rank(m: int, k: int, n: int, r: int) -> Make:
    def make() -> tuple[Variant, int]:
        from fednano_kernels import _shrink_expand_triton as se

        sets = sets_for(m * (k + n) * 2)
        a, b, s = randn(r, k, scale=k**-0.5), randn(n, r), randn(m, r)
        xs, out = [randn(m, k) for _ in range(sets)], randn(m, n)

        def run(i: int) -> None:
            se.launch(xs[i], a.T, b.T, mode=0, scale=1.0, residual=False, saved=s, mid=s, act=s, out=out)

        return run, sets

    return make


def _pair(m: int, k: int, n: int, r: int) -> Make:
    def make() -> tuple[Variant, int]:
        from fednano_kernels import _weight_grad_triton as wg

        sets = sets_for(m * (k + n) * 2)
        xs, ys, z = [randn(m, k) for _ in range(sets)], [randn(m, n) for _ in range(sets)], randn(m, r)
        da, db = randn(k, r), randn(r, n)
        return lambda i: wg.gradients(wg.Product(xs[i], z, da), wg.Product(ys[i], z, db.T)), sets

    return make


def _samples(n: int, t: int, p: int, q: int, fisher: bool) -> Make:
    def make() -> tuple[Variant, int]:
        from fednano_kernels import _weight_grad_triton as wg

        sets = sets_for(n * t * p * 2)
        xs, g, out = [randn(n, t, p) for _ in range(sets)], randn(n, t, q), randn(p, q)
        if fisher:
            return lambda i: adapter_grad_fisher(xs[i], g), sets
        return lambda i: wg.gradients(wg.Product(xs[i].flatten(0, 1), g.flatten(0, 1), out)), sets

    return make


def _loss(v: int, objective: str) -> Make:
    def make() -> tuple[Variant, int]:
        from fednano_kernels import _token_loss_triton as tt

        logits, labels = randn(2048, v), torch.randint(0, v, (2048,), device="cuda")
        return lambda _: tt.losses_and_gradients(logits, labels, None, objective, 0.1, True), 1

    return make


def _lora(m: int, k: int, n: int, r: int) -> Make:
    def make() -> tuple[Variant, int]:
        sets = min(4, sets_for((m * k + 2 * m * n) * 2))
        weight, a, b = randn(n, k, scale=k**-0.5), randn(r, k).requires_grad_(), randn(n, r).requires_grad_()
        xs, grads = [randn(m, k).requires_grad_() for _ in range(sets)], [randn(m, n) for _ in range(sets)]
        return lambda i: torch.autograd.grad(lora_linear(xs[i], weight, a, b), (xs[i], a, b), grads[i]), sets

    return make


def _grouped(r: int) -> Make:
    def make() -> tuple[Variant, int]:
        rows = CLIENTS * TOKENS
        sets = sets_for(2 * rows * WIDTH * 2)
        a, b = randn(CLIENTS, WIDTH, r, scale=WIDTH**-0.5), randn(CLIENTS, r, WIDTH)
        leaves = (a.requires_grad_(), b.requires_grad_())
        xs = [randn(rows, WIDTH).requires_grad_() for _ in range(sets)]
        offsets = torch.arange(0, rows + 1, TOKENS, device="cuda", dtype=torch.int32)

        def run(i: int) -> object:
            y = grouped_adapter(xs[i], a, b, offsets, 1.0, "gelu", validate=False)
            return torch.autograd.grad(y, (xs[i], *leaves), xs[i].detach())

        return run, sets

    return make


def _scatter(m: int) -> Make:
    def make() -> tuple[Variant, int]:
        support = Support.build(torch.randperm(WIDTH * WIDTH, device="cuda")[:ENTRIES], (WIDTH, WIDTH))
        sets = sets_for(2 * m * WIDTH * 2)
        values, xs = randn(ENTRIES).requires_grad_(), [randn(m, WIDTH).requires_grad_() for _ in range(sets)]
        grad = randn(m, WIDTH)
        return lambda i: torch.autograd.grad(
            scatter_delta(xs[i], values, support), (xs[i], values), grad
        ), sets

    return make


def _adamw(n: int) -> Make:
    def make() -> tuple[Variant, int]:
        w, m, v, fisher, g = (torch.rand(n, device="cuda") for _ in range(5))
        anchor, step = w.clone(), torch.tensor([10], device="cuda")
        return lambda _: flat_adamw_(w, g, m, v, step, lr=1e-4, fisher=fisher, anchor=anchor, mu=0.1), 1

    return make


def all_jobs() -> dict[str, tuple[str, list[Config], Make]]:
    """name -> (kernel, candidates, how to make the timed function), in an order where later ones build on earlier."""
    jobs: dict[str, tuple[str, list[Config], Make]] = {}
    for m, d, r in NANO_SHAPES:
        jobs[f"nano_adapter forward {m} {d} {r}"] = ("shrink_expand", _sweeps(r), _nano(m, d, r, False))
        jobs[f"nano_adapter backward {m} {d} {r}"] = ("shrink_expand", _sweeps(r), _nano(m, d, r, True))
        jobs[f"nano_adapter gradient {m} {d} {r}"] = ("weight_grad", _gradients(r), _pair(m, d, d, r))
    for n, t, p, q in FISHER_SHAPES:
        jobs[f"fisher {n} {t} {p} {q}"] = ("weight_grad_fisher", _gradients(q), _samples(n, t, p, q, True))
        jobs[f"fisher plain {n} {t} {p} {q}"] = ("weight_grad", _gradients(q), _samples(n, t, p, q, False))
    for v in (32000, 128256):
        for objective in ("inverted_hinge", "cross_entropy"):
            jobs[f"token_loss {v} {objective}"] = ("token_loss", _loss_tiles(), _loss(v, objective))
    for r in (16, 64):
        rows = grid(BLOCK_M=(32, 64, 128), BLOCK_K=(64, 128), num_warps=(4,), STAGES=(2, 3))
        jobs[f"grouped sweeps {r}"] = ("grouped", _sweeps(r), _grouped(r))
        jobs[f"grouped gradient {r}"] = ("grouped_grad", rows, _grouped(r))
    for m, k, n, r in LORA_SHAPES:
        for rows_of in sorted({m, min(m, 2048), min(m, 4096)}):
            jobs[f"lora sweeps {rows_of} {k} {n} {r}"] = (
                "shrink_expand",
                _sweeps(r),
                _low_rank(rows_of, k, n, r),
            )
        jobs[f"lora gradient {m} {k} {n} {r}"] = ("weight_grad", _gradients(r), _pair(m, k, n, r))
        jobs[f"lora chunk {m} {k} {n} {r}"] = ("lora_linear", grid(CHUNK=(0, 2048, 4096)), _lora(m, k, n, r))
    for m in SCATTER_ROWS:
        blocks = tuple(b for b in (128, 256, 512, 1024) if b <= m)
        gather = grid(BLOCK_M=blocks, ENTRIES=(8, 16), num_warps=(2, 4))
        gather = [c for c in gather if 4 <= c["BLOCK_M"] * c["ENTRIES"] // (32 * c["num_warps"]) <= 64]
        jobs[f"scatter gather {m}"] = ("scatter_gather", gather, _scatter(m))
        jobs[f"scatter entry {m}"] = ("scatter_entry", gather, _scatter(m))
    for n in (1 << 20, 1 << 24, 1 << 26):
        jobs[f"adamw {n}"] = ("flat_adamw", grid(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8)), _adamw(n))
    return jobs
