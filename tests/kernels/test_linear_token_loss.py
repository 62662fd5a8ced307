"""linear_token_loss against float64, torch's own losses, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fednano_kernels import OBJECTIVES, KernelArgumentError, linear_token_loss, linear_token_loss_reference
from fednano_kernels._tuning import forced
from torch import Tensor

Accurate = Callable[[Tensor, Tensor, Tensor, str], None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [(1, 16, 2), (9, 24, 37), (12, 20, 130), (5, 16, 5000)]
LARGE = [(1, 1024, 32000), (47, 100, 50257), (4097, 100, 1000), (4097, 1024, 32000)]


def _inputs(m: int, d: int, v: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(m * 1000 + d + v)
    labels = torch.randint(0, v, (m,), generator=generator)
    if m > 2:
        labels[torch.rand(m, generator=generator) < 0.3] = -100
    return {
        "hidden": torch.randn(m, d, generator=generator).to(dtype).to(device),
        "weight": (torch.randn(v, d, generator=generator) * 2 * d**-0.5).to(dtype).to(device),
        "labels": labels.to(device),
        "reference": (torch.randn(m, generator=generator) - 4).to(device),
        "grad": torch.randn(m, generator=generator).to(device),
    }


def _run(
    function: Callable[..., Tensor], inputs: dict[str, Any], objective: str, **options: Any
) -> list[Tensor]:
    hidden = inputs["hidden"].clone().requires_grad_()
    if objective == "npo":
        options["reference"] = inputs["reference"]
    losses = function(hidden, inputs["weight"], inputs["labels"], objective, **options)
    return [losses, *torch.autograd.grad(losses, hidden, inputs["grad"].to(losses.dtype))]


def _exact(inputs: dict[str, Any], objective: str) -> list[Tensor]:
    doubles = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    return _run(linear_token_loss_reference, doubles, objective)


def _check(shape: tuple[int, int, int], dtype: torch.dtype, objective: str, device: torch.device, accurate: Accurate,
           **options: Any) -> None:  # fmt: skip
    inputs = _inputs(*shape, dtype, device)
    ours = _run(linear_token_loss, inputs, objective, **options)
    plain = _run(linear_token_loss_reference, inputs, objective)
    for name, o, p, e in zip(("loss", "d hidden"), ours, plain, _exact(inputs, objective), strict=True):
        accurate(o, p, e, f"{name} at {shape} {dtype} {objective}")
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    if dtype == torch.bfloat16 or device.type == "cuda":  # slow in the interpreter
        for o, again in zip(ours, _run(linear_token_loss, inputs, objective, **options), strict=True):
            assert torch.equal(o, again), "a rerun gave other bits"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small(shape: tuple[int, int, int], dtype: torch.dtype, objective: str, device: torch.device,
               assert_accurate: Accurate) -> None:  # fmt: skip
    _check(shape, dtype, objective, device, assert_accurate, chunk_rows=4)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(shape: tuple[int, int, int], dtype: torch.dtype, objective: str, device: torch.device,
               assert_accurate: Accurate) -> None:  # fmt: skip
    _check(shape, dtype, objective, device, assert_accurate)


def test_equals_the_losses_of_torch(device: torch.device) -> None:
    inputs = _inputs(9, 24, 37, torch.float32, device)
    logits = inputs["hidden"] @ inputs["weight"].T
    want = F.cross_entropy(logits, inputs["labels"], reduction="none", ignore_index=-100)
    got = linear_token_loss(inputs["hidden"], inputs["weight"], inputs["labels"])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        linear_token_loss(inputs["hidden"], inputs["weight"], inputs["labels"], "gradient_ascent"), -want
    )
    keep = inputs["labels"] != -100
    p = logits[keep].double().softmax(-1)
    t = inputs["labels"][keep]
    best_two = p.topk(2, -1)
    rival = torch.where(best_two.indices[:, 0] == t, best_two.values[:, 1], best_two.values[:, 0])
    hinge = 1 + p[torch.arange(len(t)), t] - rival
    got = linear_token_loss(inputs["hidden"], inputs["weight"], inputs["labels"], "inverted_hinge")[keep]
    torch.testing.assert_close(got.double(), hinge, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [False, True])
def test_rows_without_label_are_dropped(given: bool, device: torch.device) -> None:
    inputs = _inputs(9, 24, 37, torch.float32, device)
    dropped = inputs["labels"] == -100
    assert dropped.any()
    assert not dropped.all()
    want = _run(linear_token_loss, inputs, "inverted_hinge")
    inputs["hidden"][dropped] = float("nan")  # would reach every row of the product, were it still in there
    count = int((~dropped).sum()) if given else None
    losses, grad = _run(linear_token_loss, inputs, "inverted_hinge", labelled_rows=count, chunk_rows=4)
    assert torch.equal(losses[dropped], torch.zeros_like(losses[dropped]))
    assert torch.equal(grad[dropped], torch.zeros_like(grad[dropped]))
    torch.testing.assert_close(losses, want[0])
    torch.testing.assert_close(grad, want[1])


def test_no_label_at_all(device: torch.device) -> None:
    inputs = _inputs(5, 16, 20, torch.float32, device)
    inputs["labels"][:] = -100
    losses, grad = _run(linear_token_loss, inputs, "cross_entropy")
    assert torch.equal(losses, torch.zeros_like(losses))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_count_that_is_too_high_stays_in_bounds(device: torch.device) -> None:
    inputs = _inputs(9, 24, 37, torch.float32, device)
    want = _run(linear_token_loss, inputs, "cross_entropy")
    got = _run(linear_token_loss, inputs, "cross_entropy", labelled_rows=9)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w)


def test_ties_take_the_lowest_rival(device: torch.device) -> None:
    hidden = torch.ones(1, 4, device=device, requires_grad=True)
    weight = torch.zeros(5000, 4, device=device)
    weight[[7, 3000, 4999]] = torch.eye(4, device=device)[:3]  # three equal logits, three different rows
    linear_token_loss(hidden, weight, torch.tensor([7], device=device), "inverted_hinge").sum().backward()
    assert hidden.grad is not None
    p = torch.softmax((hidden @ weight.T).detach(), -1)[0, 7].item()
    assert hidden.grad[0].tolist() == pytest.approx([p, -p, 0, 0], abs=1e-7)


def test_extreme_logits_stay_finite(device: torch.device) -> None:
    hidden = torch.full((4, 16), 100.0, device=device)
    weight = torch.zeros(130, 16, device=device)
    weight[3], weight[5] = 100.0, -100.0
    labels = torch.tensor([3, 5, 3, 5], device=device)
    for objective in OBJECTIVES:
        options = {"reference": torch.zeros(4, device=device)} if objective == "npo" else {}
        h = hidden.clone().requires_grad_()
        losses = linear_token_loss(h, weight, labels, objective, **options)
        (grad,) = torch.autograd.grad(losses.sum(), h)
        assert losses.isfinite().all()
        assert grad.isfinite().all()


def test_strided_inputs(device: torch.device) -> None:
    inputs = _inputs(9, 24, 37, torch.float32, device)
    want = _run(linear_token_loss, inputs, "inverted_hinge")
    odd = dict(inputs)
    odd["hidden"] = inputs["hidden"].T.contiguous().T
    odd["weight"] = inputs["weight"].T.contiguous().T
    odd["labels"] = torch.stack([inputs["labels"]] * 2, 1)[:, 0]
    for w, g in zip(want, _run(linear_token_loss, odd, "inverted_hinge"), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_reference_gradient(objective: str) -> None:
    hidden = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 6, dtype=torch.float64)
    labels = torch.tensor([0, 3, -100, 6])
    options: dict[str, Any] = (
        {"reference": torch.randn(4).double(), "beta": 0.5} if objective == "npo" else {}
    )
    assert torch.autograd.gradcheck(
        lambda h: linear_token_loss_reference(h, weight, labels, objective, **options), (hidden,)
    )


def test_opcheck(device: torch.device) -> None:
    inputs = _inputs(5, 16, 20, torch.float32, device)
    arguments = (inputs["hidden"].requires_grad_(), inputs["weight"], inputs["labels"])
    count = int((inputs["labels"] != -100).sum())
    torch.library.opcheck(
        torch.ops.fednano.linear_token_loss.default,
        (*arguments, None, "cross_entropy", 0.1, count, 4, True),
        # The second result is a saved gradient; it is not differentiable, which this one check cannot express.
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    torch.library.opcheck(
        torch.ops.fednano.linear_token_loss_backward.default, (inputs["grad"], inputs["hidden"].detach())
    )


BAD: list[tuple[str, dict[str, Any], str]] = [
    (
        "label too high",
        {"labels": torch.tensor([0, 1, 20])},
        "1 labels out of range, such as 20; expected -100",
    ),
    ("label negative", {"labels": torch.tensor([0, -1, 2])}, "out of range, such as -1"),
    ("label shape", {"labels": torch.tensor([0, 1])}, r"expected int64 \(3,\)"),
    ("label dtype", {"labels": torch.tensor([0.0, 1.0, 2.0])}, "labels are torch.float32"),
    ("weight shape", {"weight": torch.zeros(20, 15)}, "weight has shape"),
    ("weight dtype", {"weight": torch.zeros(20, 16, dtype=torch.float16)}, "weight is torch.float16"),
    ("weight trains", {"weight": torch.zeros(20, 16, requires_grad=True)}, "frozen head"),
    ("no vocabulary", {"weight": torch.zeros(1, 16)}, "vocabulary of at least 2"),
    ("zero rows", {"hidden": torch.zeros(0, 16), "labels": torch.zeros(0).long()}, "no rows"),
    ("hidden shape", {"hidden": torch.zeros(1, 3, 16)}, "hidden has shape"),
    ("objective", {"objective": "mse"}, "objective is 'mse'"),
    ("npo", {"objective": "npo"}, "npo needs reference"),
    ("beta", {"objective": "npo", "reference": torch.zeros(3), "beta": 0.0}, "beta is 0.0"),
    ("reference", {"reference": torch.zeros(3)}, "takes no reference"),
    ("chunk", {"chunk_rows": 0}, "chunk_rows is 0"),
    ("count", {"labelled_rows": 4}, "labelled_rows is 4"),
]


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(change: dict[str, Any], message: str, device: torch.device) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 16), "weight": torch.zeros(20, 16), "labels": torch.tensor([0, -100, 19]), **change,
    }  # fmt: skip
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    if "weight" in change and change["weight"].requires_grad:
        arguments["weight"] = arguments["weight"].detach().requires_grad_()
    with pytest.raises(KernelArgumentError, match=message):
        linear_token_loss(**arguments)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_tiles(
    objective: str, dtype: torch.dtype, device: torch.device, assert_accurate: Accurate
) -> None:
    # Tiles of 1024 columns by 256 lanes: whole tiles, a ragged last one, the label and the rival in any of them.
    with forced(token_loss={"BLOCK": 1024, "num_warps": 1, "STAGES": 2}):
        for v in (1024, 2048, 5000):
            _check((6, 16, v), dtype, objective, device, assert_accurate)
        test_ties_take_the_lowest_rival(device)
