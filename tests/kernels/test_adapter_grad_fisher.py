"""adapter_grad_fisher against float64, and nano_adapter_fisher against autograd sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fednano_kernels import (
    KernelArgumentError,
    adapter_grad_fisher,
    adapter_grad_fisher_reference,
    nano_adapter_fisher,
    nano_adapter_reference,
)
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [(1, 1, 24, 1), (3, 17, 40, 7), (5, 20, 33, 16), (4, 9, 16, 64), (2, 30, 5, 48)]
LARGE = [
    (1, 4097, 4096, 16),
    (16, 47, 100, 7),
    (16, 47, 4096, 1),
    (16, 700, 4096, 16),
    (16, 700, 4096, 64),
    (3, 700, 4, 999),
]


def _inputs(
    n: int, t: int, p: int, q: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + t + p + q)
    x, g = torch.randn(n, t, p, generator=generator), torch.randn(n, t, q, generator=generator)
    return x.to(dtype).to(device), g.to(dtype).to(device)


def _check(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, accurate: Accurate
) -> None:
    x, g = _inputs(*shape, dtype, device)
    ours = adapter_grad_fisher(x, g, 0.5)
    plain = adapter_grad_fisher_reference(x, g, 0.5)
    exact = adapter_grad_fisher_reference(x.double(), g.double(), 0.5)
    for name, o, p, e in zip(("gradient", "Fisher", "norms"), ours, plain, exact, strict=True):
        assert o.dtype == torch.float32
        accurate(o, p, e, f"{name} at {shape} {dtype}")
    for o, again in zip(ours, adapter_grad_fisher(x, g, 0.5), strict=True):
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


@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_nano_adapter_fisher_is_per_sample_autograd(activation: str, device: torch.device) -> None:
    n, t, d, r = 3, 6, 20, 4
    x, dy = torch.randn(n, t, d, device=device), torch.randn(n, t, d, device=device)
    a, b = torch.randn(d, r, device=device) / 4, torch.randn(r, d, device=device)
    got = nano_adapter_fisher(x, dy, a, b, 0.7, activation, gain=2.0)
    a64, b64 = a.double().requires_grad_(), b.double().requires_grad_()
    each = [
        torch.autograd.grad(
            2 * (nano_adapter_reference(x[i].double(), a64, b64, 0.7, activation) * dy[i].double()).sum(),
            (a64, b64),
        )
        for i in range(n)
    ]
    for index, name in enumerate(("a", "b")):
        grads = torch.stack([e[index] for e in each])
        for have, want in zip(
            got[name], (grads.sum(0), grads.square().sum(0), grads.flatten(1).norm(dim=1)), strict=True
        ):
            torch.testing.assert_close(have.double(), want, rtol=2e-5, atol=2e-5)


def test_a_sample_that_is_not_finite_stays_alone(device: torch.device) -> None:
    x, g = _inputs(3, 20, 24, 4, torch.float32, device)
    want = adapter_grad_fisher(x, g)[2]
    x[1] = float("nan")
    norms = adapter_grad_fisher(x, g)[2]
    assert torch.equal(norms[[0, 2]], want[[0, 2]])
    assert not norms[1].isfinite()


def test_strided_inputs(device: torch.device) -> None:
    x, g = _inputs(3, 20, 24, 4, torch.float32, device)
    want = adapter_grad_fisher(x, g)
    wide = torch.zeros(3, 20, 30, device=device)
    wide[..., :24] = x
    for odd in (wide[..., :24], x.transpose(1, 2).contiguous().transpose(1, 2)):
        for w, h in zip(want, adapter_grad_fisher(odd, g), strict=True):
            torch.testing.assert_close(h, w)


def test_opcheck(device: torch.device) -> None:
    x, g = _inputs(3, 20, 24, 4, torch.float32, device)
    torch.library.opcheck(
        torch.ops.fednano.adapter_grad_fisher.default, (x.flatten(0, 1), g.flatten(0, 1), 20, 1.0)
    )


@pytest.mark.parametrize(
    ("x", "g", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 4), "g has shape"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half(), "g is torch.float16"),
        (torch.zeros(6, 4), torch.zeros(6, 4), "x has shape"),
        (torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), "no size 0"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 0), "no size 0"),
        (torch.zeros(1, 1, 300), torch.zeros(1, 1, 300), "must be thin"),
    ],
)
def test_bad_input(x: Tensor, g: Tensor, message: str, device: torch.device) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        adapter_grad_fisher(x.to(device), g.to(device))
