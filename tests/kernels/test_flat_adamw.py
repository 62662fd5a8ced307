"""flat_adamw_ against torch.optim.AdamW and against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fednano_kernels import KernelArgumentError, flat_adamw_, flat_adamw_reference_
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _state(n: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(n, generator=generator).to(dtype)
    return {
        "w": w.to(device),
        "g": torch.randn(n, generator=generator).to(dtype).to(device),
        "m": torch.randn(n, generator=generator).to(device) / 10,
        "v": torch.rand(n, generator=generator).to(device) / 10,
        "anchor": (w + torch.randn(n, generator=generator) / 10).to(dtype).to(device),
        "fisher": torch.rand(n, generator=generator).to(device),
    }


OPTIONS = {
    "lr": 1e-2,
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "mu": 0.3,
    "fisher_weight": 2.0,
}


def _step(
    function: Callable[..., None], state: dict[str, Tensor], step: int | Tensor, **options: Any
) -> dict[str, Tensor]:
    state = {k: t.clone() for k, t in state.items()}
    function(
        state["w"],
        state["g"],
        state["m"],
        state["v"],
        step,
        anchor=state["anchor"],
        fisher=state["fisher"],
        **options,
    )
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 47, 4097])
@pytest.mark.parametrize("step", [1, 1000])
def test_against_float64(
    n: int, dtype: torch.dtype, step: int, device: torch.device, assert_accurate: Accurate
) -> None:
    state = _state(n, dtype, device)
    ours = _step(flat_adamw_, state, step, **OPTIONS)
    plain = _step(flat_adamw_reference_, state, step, **OPTIONS)
    exact = _step(flat_adamw_reference_, {k: t.double() for k, t in state.items()}, step, **OPTIONS)
    for name in ("w", "m", "v", "fisher"):
        assert_accurate(ours[name], plain[name], exact[name], f"{name} at n={n} {dtype} step {step}")
        assert torch.equal(ours[name], _step(flat_adamw_, state, step, **OPTIONS)[name]), (
            "a rerun gave other bits"
        )
    counted = _step(flat_adamw_, state, torch.tensor([step], device=device), **OPTIONS)
    assert_accurate(
        counted["w"], plain["w"], exact["w"], f"w with the step on the device, {dtype}, step {step}"
    )


def test_ten_steps_equal_torch(device: torch.device) -> None:
    w = torch.randn(300, device=device)
    twin = w.clone().requires_grad_()
    optimiser = torch.optim.AdamW([twin], lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 11):
        g = torch.randn(300, device=device)
        twin.grad = g.clone()
        optimiser.step()
        flat_adamw_(w, g, m, v, step, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.05)
    torch.testing.assert_close(w, twin.detach(), rtol=1e-6, atol=1e-6)


def test_the_pull_alone_moves_to_the_anchor(device: torch.device) -> None:
    w, anchor = torch.zeros(64, device=device), torch.linspace(-1, 1, 64, device=device)
    m, v, g = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 41):
        flat_adamw_(w, g, m, v, step, lr=0.1, anchor=anchor, mu=1.0)
    torch.testing.assert_close(w, anchor, rtol=0, atol=0.15)


def test_fisher_takes_the_gradient_as_it_came(device: torch.device) -> None:
    state = _state(47, torch.float32, device)
    after = _step(flat_adamw_, state, 3, lr=0.0, mu=5.0, fisher_weight=0.5)
    torch.testing.assert_close(after["fisher"], state["fisher"] + 0.5 * state["g"] ** 2)
    assert torch.equal(after["w"], state["w"])


def test_opcheck(device: torch.device) -> None:
    s = _state(47, torch.float32, device)
    arguments = (
        s["w"],
        s["g"],
        s["m"],
        s["v"],
        s["anchor"],
        s["fisher"],
        None,
        3,
        1e-3,
        0.9,
        0.999,
        1e-8,
        0.1,
        0.1,
        1.0,
    )
    torch.library.opcheck(torch.ops.fednano.flat_adamw_.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(4, 4)}, "w has shape"),
        ({"w": torch.zeros(0)}, "w has shape"),
        ({"g": torch.zeros(3)}, "g has shape"),
        ({"m": torch.zeros(4).half()}, "m is torch.float16"),
        ({"v": torch.zeros(8)[::2]}, "v is not contiguous"),
        ({"step": 0}, "step is 0"),
        ({"step": torch.tensor([1.0])}, "step is torch.float32"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas are \(1.0, 0.9\)"),
        ({"mu": 0.1}, "no anchor"),
        ({"anchor": torch.zeros(4).half()}, "anchor is torch.float16"),
        ({"fisher": torch.zeros(4, dtype=torch.float64)}, "fisher is torch.float64"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, device: torch.device) -> None:
    good = {**{k: torch.zeros(4) for k in "wgmv"}, "step": 1, "lr": 0.1, **change}
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in good.items()}
    if message == "v is not contiguous":
        arguments["v"] = torch.zeros(8, device=device)[::2]
    with pytest.raises(KernelArgumentError, match=message):
        flat_adamw_(**arguments)
