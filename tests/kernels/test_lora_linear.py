"""lora_linear against float64, for every form of the matrix in the middle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fednano_kernels import KernelArgumentError, lora_linear, lora_linear_reference
from fednano_kernels._tuning import forced
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [(1, 24, 20, 1), (18, 40, 56, 7)]
LARGE = [(1, 4096, 4096, 16), (47, 100, 300, 7), (4097, 1024, 1000, 4), (4097, 4096, 4096, 64)]
MIXES = ["none", "diagonal", "dense"]


def _inputs(m: int, k: int, n: int, r: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(m + k + n + r)
    shapes = {
        "x": ((m, k), 1.0), "weight": ((n, k), k**-0.5), "a": ((r, k), k**-0.5), "b": ((n, r), r**-0.5),
        "diagonal": ((r,), 1.0), "dense": ((r, r), r**-0.5), "bias": ((n,), 1.0), "grad": ((m, n), 1.0),
    }  # fmt: skip
    return {
        name: (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)
        for name, (shape, scale) in shapes.items()
    }


def _run(function: Callable[..., Tensor], inputs: dict[str, Tensor], mix: str, bias: bool) -> list[Tensor]:
    x, a, b = (inputs[k].clone().requires_grad_() for k in "xab")
    middle = None if mix == "none" else inputs[mix].clone().requires_grad_()
    leaves = [t for t in (x, a, b, middle) if t is not None]
    y = function(x, inputs["weight"], a, b, 0.7, middle, inputs["bias"] if bias else None)
    return [y, *torch.autograd.grad(y, leaves, inputs["grad"])]


def _check(shape: tuple[int, int, int, int], dtype: torch.dtype, mix: str, device: torch.device,
           accurate: Accurate) -> None:  # fmt: skip
    inputs = _inputs(*shape, dtype, device)
    bias = mix != "none"
    ours = _run(lora_linear, inputs, mix, bias)
    plain = _run(lora_linear_reference, inputs, mix, bias)
    exact = _run(lora_linear_reference, {k: t.double() for k, t in inputs.items()}, mix, bias)
    for name, o, p, e in zip(("y", "dx", "dA", "dB", "dM"), ours, plain, exact, strict=False):
        assert o.dtype == dtype
        accurate(o, p, e, f"{name} at {shape} {dtype} {mix}")
    if dtype == torch.bfloat16 or device.type == "cuda":  # slow in the interpreter
        for o, again in zip(ours, _run(lora_linear, inputs, mix, bias), strict=True):
            assert torch.equal(o, again), "a rerun gave other bits"


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    mix: str,
    device: torch.device,
    assert_accurate: Accurate,
) -> None:
    _check(shape, dtype, mix, device, assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    mix: str,
    device: torch.device,
    assert_accurate: Accurate,
) -> None:
    _check(shape, dtype, mix, device, assert_accurate)


def test_chunks_change_no_bits(device: torch.device) -> None:
    inputs = _inputs(33, 40, 56, 7, torch.float32, device)
    whole = _run(lora_linear, inputs, "dense", True)
    with forced(lora_linear={"CHUNK": 16}):
        parts = _run(lora_linear, inputs, "dense", True)
    for w, p in zip(whole, parts, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_frozen_a_keeps_only_its_product(mix: str, device: torch.device) -> None:
    inputs = _inputs(33, 40, 56, 7, torch.float32, device)
    b = inputs["b"].clone().requires_grad_()
    middle = None if mix == "none" else inputs[mix].clone().requires_grad_()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = lora_linear(inputs["x"], inputs["weight"], inputs["a"], b, 0.7, middle)
    assert (33, 7) in saved
    assert (33, 40) not in saved, "x was kept although A is frozen"
    assert (33, 56) not in saved
    leaves = [t for t in (b, middle) if t is not None]
    twin_b = b.detach().double().requires_grad_()
    twin_middle = None if middle is None else middle.detach().double().requires_grad_()
    doubles = {k: t.double() for k, t in inputs.items()}
    z = lora_linear_reference(doubles["x"], doubles["weight"], doubles["a"], twin_b, 0.7, twin_middle)
    twins = [t for t in (twin_b, twin_middle) if t is not None]
    got = torch.autograd.grad(y, leaves, inputs["grad"])
    want = torch.autograd.grad(z, twins, doubles["grad"])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


def test_batched_and_strided_input(device: torch.device) -> None:
    inputs = _inputs(24, 40, 56, 7, torch.float32, device)
    want = lora_linear(inputs["x"], inputs["weight"], inputs["a"], inputs["b"])
    batched = lora_linear(inputs["x"].view(2, 12, 40), inputs["weight"], inputs["a"], inputs["b"])
    assert torch.equal(batched.view(24, 56), want)
    odd = inputs["x"].T.contiguous().T
    twisted = lora_linear(odd, inputs["weight"].T.contiguous().T, inputs["a"].T.contiguous().T, inputs["b"])
    torch.testing.assert_close(twisted, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_reference_gradient(mix: str) -> None:
    inputs = {k: t.double() for k, t in _inputs(3, 5, 4, 2, torch.float32, torch.device("cpu")).items()}
    leaves = [inputs[k].requires_grad_() for k in ("x", "a", "b", *([] if mix == "none" else [mix]))]
    assert torch.autograd.gradcheck(
        lambda x, a, b, m=None: lora_linear_reference(x, inputs["weight"], a, b, 0.7, m, inputs["bias"]),
        leaves,
    )


def test_opcheck(device: torch.device) -> None:
    inputs = _inputs(5, 24, 20, 4, torch.float32, device)
    x, a, b, mix = (inputs[k].requires_grad_() for k in ("x", "a", "b", "dense"))
    torch.library.opcheck(
        torch.ops.fednano.lora_linear.default, (x, inputs["weight"], a, b, mix, inputs["bias"], 0.5)
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(0, 24)}, "at least one row"),
    ({"x": torch.zeros(5, 23)}, "weight has shape"),
    ({"a": torch.zeros(0, 24), "b": torch.zeros(20, 0)}, "rank 0"),
    ({"a": torch.zeros(4, 23)}, "a has shape"),
    ({"b": torch.zeros(4, 20)}, "b has shape"),
    ({"mix": torch.zeros(3)}, "mix has shape"),
    ({"mix": torch.zeros(4, 5)}, "mix has shape"),
    ({"bias": torch.zeros(4)}, "bias has shape"),
    ({"weight": torch.zeros(20, 24, requires_grad=True)}, "frozen weight"),
    ({"b": torch.zeros(20, 4).half()}, "b is torch.float16"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[b[1] for b in BAD])
def test_bad_input(change: dict[str, Any], message: str, device: torch.device) -> None:
    inputs = _inputs(5, 24, 20, 4, torch.float32, device)
    arguments = {k: inputs[k] for k in ("x", "weight", "a", "b")}
    arguments |= {k: t.detach().to(device).requires_grad_(t.requires_grad) for k, t in change.items()}
    with pytest.raises(KernelArgumentError, match=message):
        lora_linear(**arguments)
