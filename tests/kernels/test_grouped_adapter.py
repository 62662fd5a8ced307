"""grouped_adapter against float64 and against nano_adapter client by client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fednano_kernels import KernelArgumentError, grouped_adapter, grouped_adapter_reference
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL: list[tuple[list[int], int, int]] = [([0, 17, 3], 24, 7), ([1, 0, 19, 2, 0], 20, 16)]
LARGE: list[tuple[list[int], int, int]] = [
    ([128] * 64, 4096, 16),
    ([0, 700, 1, 0, 4097, 47], 1000, 7),
    ([3] * 100, 1024, 64),
]


def _inputs(
    lengths: list[int], d: int, r: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + d + r)
    clients, rows = len(lengths), sum(lengths)
    floats = {
        "x": torch.randn(rows, d, generator=generator),
        "a": torch.randn(clients, d, r, generator=generator) * d**-0.5,
        "b": torch.randn(clients, r, d, generator=generator) * r**-0.5,
        "grad": torch.randn(rows, d, generator=generator),
    }
    inputs = {name: t.to(dtype).to(device) for name, t in floats.items()}
    inputs["offsets"] = torch.tensor([0, *lengths]).cumsum(0).to(device)
    inputs["ranks"] = torch.tensor([1 + (c * 5) % r for c in range(clients)], device=device)
    return inputs


def _run(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], activation: str, ranked: bool
) -> list[Tensor]:
    x, a, b = (inputs[k].clone().requires_grad_() for k in "xab")
    ranks: dict[str, Any] = {"ranks": inputs["ranks"]} if ranked else {}
    y = function(x, a, b, inputs["offsets"], 0.7, activation, **ranks)
    return [y, *torch.autograd.grad(y, (x, a, b), inputs["grad"])]


def _check(shape: tuple[list[int], int, int], dtype: torch.dtype, activation: str, ranked: bool, device: torch.device,
           accurate: Accurate) -> None:  # fmt: skip
    inputs = _inputs(*shape, dtype, device)
    ours = _run(grouped_adapter, inputs, activation, ranked)
    plain = _run(grouped_adapter_reference, inputs, activation, ranked)
    doubles = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    exact = _run(grouped_adapter_reference, doubles, activation, ranked)
    for name, o, p, e in zip(("y", "dx", "dA", "dB"), ours, plain, exact, strict=True):
        accurate(o, p, e, f"{name} at {shape} {dtype} {activation} ranked={ranked}")
    for c, length in enumerate(shape[0]):
        used = int(inputs["ranks"][c]) if ranked else shape[2]
        assert not ours[2][c, :, used:].any(), "a gradient beyond the client's rank"
        assert not ours[3][c, used:].any(), "a gradient beyond the client's rank"
        if length == 0:
            assert not ours[2][c].any(), "an empty client has a gradient"
            assert not ours[3][c].any(), "an empty client has a gradient"
    if dtype == torch.bfloat16 or device.type == "cuda":  # slow in the interpreter
        for o, again in zip(ours, _run(grouped_adapter, inputs, activation, ranked), strict=True):
            assert torch.equal(o, again), "a rerun gave other bits"


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small(
    shape: tuple[list[int], int, int],
    dtype: torch.dtype,
    ranked: bool,
    device: torch.device,
    assert_accurate: Accurate,
) -> None:
    _check(shape, dtype, "gelu" if ranked else "linear", ranked, device, assert_accurate)


@pytest.mark.gpu
@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("activation", ["linear", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=["64 clients", "ragged", "100 clients"])
def test_large(
    shape: tuple[list[int], int, int], dtype: torch.dtype, activation: str, ranked: bool,
    device: torch.device, assert_accurate: Accurate,
) -> None:  # fmt: skip
    _check(shape, dtype, activation, ranked, device, assert_accurate)


def test_padding_beyond_a_rank_is_not_read(device: torch.device) -> None:
    inputs = _inputs([4, 9], 24, 6, torch.float32, device)
    inputs["ranks"] = torch.tensor([2, 6], device=device)
    want = _run(grouped_adapter, inputs, "gelu", True)
    inputs["a"][0, :, 2:] = float("nan")
    inputs["b"][0, 2:] = float("nan")
    for w, g in zip(want, _run(grouped_adapter, inputs, "gelu", True), strict=True):
        assert torch.equal(w, g)


def test_int32_offsets(device: torch.device) -> None:
    inputs = _inputs([4, 0, 9], 24, 6, torch.float32, device)
    want = _run(grouped_adapter, inputs, "linear", False)
    inputs["offsets"] = inputs["offsets"].int()
    for w, g in zip(want, _run(grouped_adapter, inputs, "linear", False), strict=True):
        assert torch.equal(w, g)


@pytest.mark.parametrize("offsets", [[0, -50, 999], [7, 3, 1], [500, 600, 700], [-9, -8, -7]])
def test_wrong_offsets_stay_in_bounds(offsets: list[int], device: torch.device) -> None:
    inputs = _inputs([4, 9], 24, 6, torch.float32, device)
    y = grouped_adapter(
        *(inputs[k].requires_grad_() for k in "xab"), torch.tensor(offsets, device=device), validate=False
    )
    y.nan_to_num().sum().backward()


def test_reference_gradient() -> None:
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in
              _inputs([2, 0, 3], 5, 2, torch.float32, torch.device("cpu")).items()}  # fmt: skip
    leaves = [inputs[k].requires_grad_() for k in "xab"]
    assert torch.autograd.gradcheck(
        lambda x, a, b: grouped_adapter_reference(x, a, b, inputs["offsets"], 0.7, "gelu", inputs["ranks"]),
        leaves,
    )


def test_opcheck(device: torch.device) -> None:
    inputs = _inputs([2, 0, 3], 24, 4, torch.float32, device)
    x, a, b = (inputs[k].requires_grad_() for k in "xab")
    arguments = (x, a, b, inputs["offsets"], inputs["ranks"], 0.5, "gelu")
    torch.library.opcheck(torch.ops.fednano.grouped_adapter.default, arguments)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"offsets": torch.tensor([0, 9, 4])}, "monotone"),
    ({"offsets": torch.tensor([0, 4, 12])}, "from 0 to 13"),
    ({"offsets": torch.tensor([0, 13])}, r"expected int32 or int64 \(3,\)"),
    ({"offsets": torch.tensor([0.0, 4.0, 13.0])}, "offsets is"),
    ({"ranks": torch.tensor([0, 3])}, "ranks are"),
    ({"ranks": torch.tensor([3, 7])}, "from 1 to 6"),
    ({"x": torch.zeros(13, 23)}, "a has shape"),
    ({"b": torch.zeros(2, 5, 24)}, "b has shape"),
    ({"a": torch.zeros(2, 24, 0), "b": torch.zeros(2, 0, 24)}, "a rank at least"),
    ({"x": torch.zeros(0, 24), "offsets": torch.tensor([0, 0, 0])}, "at least one row"),
    ({"a": torch.zeros(2, 24, 6).half()}, "a is torch.float16"),
    ({"activation": "relu"}, "activation"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[b[1] for b in BAD])
def test_bad_input(change: dict[str, Any], message: str, device: torch.device) -> None:
    inputs = _inputs([4, 9], 24, 6, torch.float32, device)
    arguments: dict[str, Any] = {k: inputs[k] for k in ("x", "a", "b", "offsets")}
    arguments |= {k: t.to(device) if isinstance(t, Tensor) else t for k, t in change.items()}
    with pytest.raises(KernelArgumentError, match=message):
        grouped_adapter(**arguments)
