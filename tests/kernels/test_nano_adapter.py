"""nano_adapter against float64, against plain torch, and against bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fednano_kernels import KernelArgumentError, nano_adapter, nano_adapter_reference
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [(1, 24, 1), (47, 40, 7), (35, 130, 4), (33, 64, 16), (20, 48, 64)]
LARGE = [
    (1, 100, 1),
    (1, 4096, 16),
    (47, 100, 7),
    (47, 1000, 64),
    (4097, 1000, 4),
    (4097, 1024, 1),
    (4097, 4096, 16),
    (4097, 4096, 64),
]


def _inputs(m: int, d: int, r: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m * 1000 + d + r)
    shapes = [((m, d), 1.0), ((d, r), d**-0.5), ((r, d), r**-0.5), ((m, d), 1.0)]
    return [(torch.randn(s, generator=generator) * scale).to(dtype).to(device) for s, scale in shapes]


def _run(
    function: Callable[..., Tensor], tensors: list[Tensor], scale: float, activation: str
) -> list[Tensor]:
    x, a, b = (t.clone().requires_grad_() for t in tensors[:3])
    y = function(x, a, b, scale, activation)
    return [y, *torch.autograd.grad(y, (x, a, b), tensors[3].reshape(y.shape))]


def _check(
    m: int, d: int, r: int, dtype: torch.dtype, act: str, device: torch.device, accurate: Accurate
) -> None:
    tensors = _inputs(m, d, r, dtype, device)
    ours = _run(nano_adapter, tensors, 0.7, act)
    plain = _run(nano_adapter_reference, tensors, 0.7, act)
    exact = _run(nano_adapter_reference, [t.double() for t in tensors], 0.7, act)
    for name, o, p, e in zip(("y", "dx", "dA", "dB"), ours, plain, exact, strict=True):
        assert o.dtype == dtype
        accurate(o, p, e, f"{name} at M={m} d={d} r={r} {dtype} {act}")
    if dtype == torch.bfloat16 or device.type == "cuda":  # slow in the interpreter
        for o, again in zip(ours, _run(nano_adapter, tensors, 0.7, act), strict=True):
            assert torch.equal(o, again), "a rerun gave other bits"


@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "d", "r"), SMALL)
def test_small(
    m: int,
    d: int,
    r: int,
    dtype: torch.dtype,
    activation: str,
    device: torch.device,
    assert_accurate: Accurate,
) -> None:
    _check(m, d, r, dtype, activation, device, assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "d", "r"), LARGE)
def test_large(
    m: int,
    d: int,
    r: int,
    dtype: torch.dtype,
    activation: str,
    device: torch.device,
    assert_accurate: Accurate,
) -> None:
    _check(m, d, r, dtype, activation, device, assert_accurate)


def test_strided_and_batched_input(device: torch.device, assert_accurate: Accurate) -> None:
    x, a, b, _ = _inputs(24, 32, 4, torch.float32, device)
    wide = torch.randn(24, 48, device=device)
    views = {
        "row stride": wide[:, :32],
        "every other row": torch.randn(48, 32, device=device)[::2],
        "columns not contiguous": torch.randn(32, 24, device=device).T,
        "expanded row": x[:1].expand(24, 32),
        "batched": x.view(2, 3, 4, 32),
    }
    for name, view in views.items():
        got = nano_adapter(view, a.T.contiguous().T, b, 1.0, "gelu")
        plain = nano_adapter_reference(view, a, b, 1.0, "gelu")
        exact = nano_adapter_reference(view.double(), a.double(), b.double(), 1.0, "gelu")
        assert_accurate(got, plain, exact, name)
    # A gradient that is not contiguous, as from a transposed or summed output.
    leaf = x.clone().requires_grad_()
    nano_adapter(leaf, a, b).sum().backward()
    twin = x.double().requires_grad_()
    nano_adapter_reference(twin, a.double(), b.double(), 1.0, "linear").sum().backward()
    assert leaf.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-5, atol=1e-5)


def test_only_the_asked_gradients(device: torch.device) -> None:
    x, a, b, g = _inputs(20, 32, 4, torch.float32, device)
    whole = _run(nano_adapter, [x, a, b, g], 1.0, "gelu")
    a_, b_ = a.clone().requires_grad_(), b.clone().requires_grad_()
    for got, want in zip(
        torch.autograd.grad(nano_adapter(x, a_, b_, 1.0, "gelu"), (a_, b_), g), whole[2:], strict=True
    ):
        assert torch.equal(got, want)
    x_ = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(nano_adapter(x_, a, b, 1.0, "gelu"), x_, g)
    assert torch.equal(dx, whole[1])


def test_saves_the_pre_activation_only(device: torch.device) -> None:
    x, a, b, _ = _inputs(20, 32, 4, torch.float32, device)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        nano_adapter(x.requires_grad_(), a.requires_grad_(), b.requires_grad_(), 1.0, "gelu")
    assert sorted(saved) == sorted([(20, 32), (32, 4), (4, 32), (20, 4)]), "the inputs and z, nothing else"


@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_reference_gradient(activation: str) -> None:
    x, a, b, _ = (t.double().requires_grad_() for t in _inputs(3, 5, 2, torch.float32, torch.device("cpu")))
    assert torch.autograd.gradcheck(lambda *t: nano_adapter_reference(*t, 0.7, activation), (x, a, b))


def test_opcheck(device: torch.device) -> None:
    x, a, b, g = _inputs(5, 24, 4, torch.float32, device)
    for activation in ("linear", "gelu"):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        torch.library.opcheck(torch.ops.fednano.nano_adapter.default, (*leaves, 0.5, activation))
        z = torch.randn(5, 4, device=device)
        torch.library.opcheck(
            torch.ops.fednano.nano_adapter_backward.default, (g, x, z, a, b, 0.5, activation, True, True)
        )


BAD = [
    ("dtype of a", lambda x, a, b: (x, a.double(), b), "a is torch.float64"),
    ("integers", lambda x, a, b: (x.int(), a, b), "x is torch.int32"),
    ("shape of a", lambda x, a, b: (x, a[:-1], b), "a has shape"),
    ("shape of b", lambda x, a, b: (x, a, b.T), "b has shape"),
    ("rank 0", lambda x, a, b: (x, a[:, :0], b[:0]), "rank 0"),
    ("device", lambda x, a, b: (x, a.to("meta"), b), "a is on meta"),
    ("zero rows", lambda x, a, b: (x[:0], a, b), "at least one row"),
]


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change: Callable[..., tuple[Tensor, ...]], message: str, device: torch.device) -> None:
    x, a, b, _ = _inputs(5, 24, 4, torch.float32, device)
    with pytest.raises(KernelArgumentError, match=message):
        nano_adapter(*change(x, a, b))


def test_unknown_activation(device: torch.device) -> None:
    x, a, b, _ = _inputs(5, 24, 4, torch.float32, device)
    with pytest.raises(KernelArgumentError, match="activation is 'relu'"):
        nano_adapter(x, a, b, 1.0, "relu")


@pytest.mark.gpu
def test_more_than_2_31_elements(device: torch.device) -> None:
    d, m = 4096, 2**31 // 4096 + 64
    x = torch.zeros(m, d, device=device, dtype=torch.bfloat16)
    x[-64:] = torch.randn(64, d, device=device)
    a, b = (torch.randn(s, device=device, dtype=torch.bfloat16) / 16 for s in ((d, 16), (16, d)))
    y = nano_adapter(x, a, b, 1.0, "gelu")
    assert torch.equal(y[-64:], nano_adapter(x[-64:].clone(), a, b, 1.0, "gelu"))


def test_torch_func_takes_the_reference(device: torch.device) -> None:
    x, a, b, _ = _inputs(6, 24, 4, torch.float32, device)
    each = torch.func.vmap(
        torch.func.grad(lambda a, row: nano_adapter(row, a, b, 1.0, "gelu").sum()), (None, 0)
    )(a, x.view(3, 2, 24))
    leaf = a.clone().requires_grad_()
    nano_adapter(x, leaf, b, 1.0, "gelu").sum().backward()
    torch.testing.assert_close(each.sum(0), leaf.grad, rtol=1e-4, atol=1e-5)
