"""scatter_delta and seeded_combine against float64, and the generator against published vectors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from fednano_kernels import (
    KernelArgumentError,
    Support,
    scatter_delta,
    scatter_delta_reference,
    seeded_combine,
    seeded_combine_reference,
    seeded_uniform,
    seeded_uniform_reference,
)
from fednano_kernels.seeded_combine import _philox
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, n, k, entries
SMALL = [(1, 20, 24, 1), (33, 17, 40, 90), (47, 20, 16, 200)]
LARGE = [(1, 4096, 4096, 131072), (47, 100, 300, 999), (513, 4096, 1000, 40000)]


def _sparse(
    m: int, n: int, k: int, e: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Support]:
    generator = torch.Generator().manual_seed(m + n + k + e)
    support = Support.build(torch.randperm(n * k, generator=generator)[:e].to(device), (n, k))
    tensors = (
        torch.randn(shape, generator=generator).to(dtype).to(device) for shape in ((m, k), (e,), (m, n))
    )
    x, values, grad = tensors
    return x, values, grad, support


def _run(
    function: Callable[..., Tensor], x: Tensor, values: Tensor, grad: Tensor, support: Support
) -> list[Tensor]:
    x, values = x.clone().requires_grad_(), values.clone().requires_grad_()
    y = function(x, values, support)
    return [y, *torch.autograd.grad(y, (x, values), grad)]


def _check(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, accurate: Accurate
) -> None:
    x, values, grad, support = _sparse(*shape, dtype, device)
    ours = _run(scatter_delta, x, values, grad, support)
    plain = _run(scatter_delta_reference, x, values, grad, support)
    exact = _run(scatter_delta_reference, x.double(), values.double(), grad.double(), support)
    for name, o, p, e in zip(("y", "dx", "dv"), ours, plain, exact, strict=True):
        accurate(o, p, e, f"{name} at {shape} {dtype}")
    for o, again in zip(ours, _run(scatter_delta, x, values, grad, support), strict=True):
        assert torch.equal(o, again), "a rerun gave other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, assert_accurate: Accurate
) -> None:
    _check(shape, dtype, device, assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, assert_accurate: Accurate
) -> None:
    _check(shape, dtype, device, assert_accurate)


def test_strided_and_batched_input(device: torch.device) -> None:
    x, values, _, support = _sparse(24, 17, 40, 90, torch.float32, device)
    want = scatter_delta(x, values, support)
    assert torch.equal(scatter_delta(x.view(2, 12, 40), values, support).view(24, 17), want)
    assert torch.equal(scatter_delta(x.T.contiguous().T, values.repeat_interleave(2)[::2], support), want)


def test_gradients_of_the_references() -> None:
    x, values, _, support = _sparse(3, 4, 5, 7, torch.float32, torch.device("cpu"))
    leaves = (x.double().requires_grad_(), values.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: scatter_delta_reference(a, b, support), leaves)
    key = torch.tensor(5)
    coefficients = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: seeded_combine_reference(c, key, 9, 1.0), coefficients)


def test_opcheck(device: torch.device) -> None:
    x, values, _, s = _sparse(5, 17, 24, 50, torch.float32, device)
    walks = [s.column_start, s.column_row, s.column_entry, s.row_start, s.row_column, s.row_entry]
    torch.library.opcheck(
        torch.ops.fednano.scatter_delta.default, (x.requires_grad_(), values.requires_grad_(), walks)
    )
    coefficients = torch.randn(6, device=device, requires_grad=True)
    torch.library.opcheck(
        torch.ops.fednano.seeded_combine.default, (coefficients, torch.tensor(7, device=device), 30, 1.0)
    )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([0, 12]), "expected 0 to 11"),
        (torch.tensor([-1, 3]), "from -1"),
        (torch.tensor([3, 3]), "repeated"),
        (torch.tensor([], dtype=torch.int64), "got 0 positions"),
        (torch.tensor([1.0]), "int64"),
    ],
)
def test_bad_support(positions: Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        Support.build(positions, (3, 4))


def test_bad_input(device: torch.device) -> None:
    x, values, _, support = _sparse(5, 17, 24, 50, torch.float32, device)
    for arguments, message in [
        ((x[:, :-1], values), "expected \\(..., 24\\)"),
        ((x[:0], values), "at least one row"),
        ((x, values[:-1]), "values has shape"),
        ((x, values.half()), "values is torch.float16"),
    ]:
        with pytest.raises(KernelArgumentError, match=message):
            scatter_delta(*arguments, support)
    key = torch.tensor(3, device=device)
    for coefficients, k, n, bound, message in [
        (torch.zeros(0), key, 4, 1.0, "0 planes"),
        (torch.zeros(3), key.int(), 4, 1.0, "0-d int64"),
        (torch.zeros(3), key[None], 4, 1.0, "0-d int64"),
        (torch.zeros(3), key, 0, 1.0, "n is 0"),
        (torch.zeros(3), key, 4, 0.0, "bound is 0.0"),
        (torch.zeros(3, 3), key, 4, 1.0, "coefficients has shape"),
    ]:
        with pytest.raises(KernelArgumentError, match=message):
            seeded_combine(coefficients.to(device), k, n, bound)


def test_philox_known_answers() -> None:
    # The vectors of the authors' Random123 library for philox4x32-10 whose counters this generator can express.
    zero = torch.zeros(1, dtype=torch.int64)
    got = [int(w) for w in _philox(zero, zero, torch.tensor(0))]
    assert got == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("key", [0, 5, -3, 2**62 + 12345])
@pytest.mark.parametrize(("planes", "n"), [(1, 1), (4, 70), (7, 129)])
def test_kernel_draws_the_bits_of_the_reference(key: int, planes: int, n: int, device: torch.device) -> None:
    k = torch.tensor(key, device=device)
    got = seeded_uniform(k, planes, n, 0.37)
    assert torch.equal(got, seeded_uniform_reference(k, planes, n, 0.37))
    assert got.abs().max() < 0.37


def test_first_plane_of_the_reference() -> None:
    k = torch.tensor(11)
    whole = seeded_uniform_reference(k, 11, 30, 1.0)
    assert torch.equal(seeded_uniform_reference(k, 5, 30, 1.0, first=3), whole[3:8])


def test_uniform_in_distribution() -> None:
    drawn = seeded_uniform_reference(torch.tensor(1), 8, 20000, math.sqrt(3)).double()
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.var()) - 1) < 0.01
    assert float((drawn @ drawn.T / 20000 - torch.eye(8)).abs().max()) < 0.04


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("planes", "n"), [(1, 70), (7, 100), (30, 33)])
def test_combine(
    planes: int, n: int, dtype: torch.dtype, device: torch.device, assert_accurate: Accurate
) -> None:
    generator = torch.Generator().manual_seed(planes)
    coefficients = torch.randn(planes, generator=generator).to(dtype).to(device)
    grad = torch.randn(n, generator=generator).to(dtype).to(device)
    key = torch.tensor(1234567890123, device=device)

    def run(function: Callable[..., Tensor], c: Tensor, g: Tensor) -> list[Tensor]:
        leaf = c.clone().requires_grad_()
        out = function(leaf, key, n, 0.5)
        return [out, *torch.autograd.grad(out, leaf, g)]

    ours, plain = run(seeded_combine, coefficients, grad), run(seeded_combine_reference, coefficients, grad)
    exact = run(seeded_combine_reference, coefficients.double(), grad.double())
    for name, o, p, e in zip(("sum", "gradient"), ours, plain, exact, strict=True):
        assert o.dtype == dtype
        assert_accurate(o, p, e, f"{name} of {planes} planes of {n}, {dtype}")
    for o, again in zip(ours, run(seeded_combine, coefficients, grad), strict=True):
        assert torch.equal(o, again), "a rerun gave other bits"
