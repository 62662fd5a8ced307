"""Token losses against closed forms in float64 and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednano.errors import ConfigError
from fednano.training.objectives import cross_entropy, get_objective, inverted_hinge, objective_names


def sample(n: int, v: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, v, generator=g, dtype=torch.float64)
    return logits, torch.randint(v, (n,), generator=g)


def closed_form(name: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses ``(N,)`` and gradients ``(N, V)`` of their sum, written out with explicit exponentials."""
    losses, grads = [], []
    for z, t in zip(logits, labels.tolist(), strict=True):
        p = torch.exp(z - z.max())
        p = p / p.sum()
        e = torch.eye(len(z), dtype=torch.float64)
        j = max((v for v in range(len(z)) if v != t), key=lambda v: float(p[v]))
        if name == "cross_entropy":
            losses.append(-p[t].log())
            grads.append(p - e[t])
        elif name == "gradient_ascent":
            losses.append(p[t].log())
            grads.append(e[t] - p)
        else:
            losses.append(1 + p[t] - p[j])
            grads.append((p[j] - p[t]) * p + p[t] * e[t] - p[j] * e[j])
    return torch.stack(losses), torch.stack(grads)


@pytest.mark.parametrize("name", objective_names())
@settings(deadline=None)
@given(n=st.integers(1, 6), v=st.integers(2, 40), seed=st.integers(0, 2**31))
def test_loss_and_gradient_equal_the_closed_form(name: str, n: int, v: int, seed: int) -> None:
    logits, labels = sample(n, v, seed)
    logits.requires_grad_()
    got = get_objective(name)(logits, labels)
    (grad,) = torch.autograd.grad(got.sum(), logits)
    loss, dz = closed_form(name, logits.detach(), labels)
    torch.testing.assert_close(got.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, dz, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", objective_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits, labels = sample(50, 300, 1)
    narrow = logits.to(dtype)
    got = get_objective(name)(narrow, labels)
    assert got.dtype == torch.float32
    loss, _ = closed_form(name, narrow.double(), labels)
    torch.testing.assert_close(got.double(), loss, rtol=2e-6, atol=2e-6)


@settings(deadline=None)
@given(n=st.integers(1, 6), v=st.integers(2, 12), seed=st.integers(0, 2**31), spread=st.floats(0, 300))
def test_inverted_hinge_is_bounded_and_fades_once_forgotten(n: int, v: int, seed: int, spread: float) -> None:
    logits, labels = sample(n, v, seed, spread)
    loss = inverted_hinge(logits, labels)
    assert bool(((loss >= 0) & (loss <= 2)).all())
    forgotten = torch.zeros(1, v, dtype=torch.float64)
    forgotten[0, 0], forgotten[0, 1] = -40.0, 40.0
    forgotten.requires_grad_()
    (grad,) = torch.autograd.grad(inverted_hinge(forgotten, torch.tensor([0])).sum(), forgotten)
    assert float(grad.abs().max()) < 1e-12


def test_ties_give_one_subgradient() -> None:
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    loss = inverted_hinge(logits, torch.tensor([2]))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.item() == 1.0
    assert sorted(grad[0].tolist()) == [-0.25, 0.0, 0.0, 0.25]
    assert grad[0, 2] == 0.25


def test_gradient_ascent_is_the_negative_of_cross_entropy() -> None:
    logits, labels = sample(9, 17, 3)
    assert torch.equal(get_objective("gradient_ascent")(logits, labels), -cross_entropy(logits, labels))


def test_bad_names_and_vocabularies_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown objective 'hinge'.*cross_entropy, gradient_ascent"):
        get_objective("hinge")
    with pytest.raises(ConfigError, match="at least 2 tokens, got 1"):
        inverted_hinge(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))
