"""Losses of unlearning baselines: value and gradient against closed forms in float64, and through a host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fednano.data import Sample
from fednano.errors import ConfigError
from fednano.host import RemoteLLM
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LanguageModel, LocalLLM
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.objectives import dpo, kl_divergence, npo, simnpo

SEEDS = st.integers(0, 2**31)
BETAS = st.floats(0.01, 5)


def losses(count: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [5 * torch.rand(4, generator=g, dtype=torch.float64) for _ in range(count)]


def logistic(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, beta=BETAS)
def test_npo_value_and_gradient(seed: int, beta: float) -> None:
    nll, reference = losses(2, seed)
    nll.requires_grad_()
    got = npo(nll, reference, beta)
    (grad,) = torch.autograd.grad(got.sum(), nll)
    ratio = torch.exp(reference - nll.detach())  # of the answer's probabilities
    torch.testing.assert_close(got.detach(), 2 / beta * torch.log(1 + ratio**beta), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, -2 * ratio**beta / (1 + ratio**beta), rtol=1e-9, atol=1e-12)


def test_npo_starts_as_gradient_ascent_and_ends_by_itself() -> None:
    nll = torch.tensor([3.0, 500.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(npo(nll, torch.tensor([3.0, 3.0], dtype=torch.float64), 0.1).sum(), nll)
    assert grad[0] == -1
    assert abs(float(grad[1])) < 1e-20


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, beta=BETAS, delta=st.floats(-1, 1))
def test_simnpo_value_and_gradient(seed: int, beta: float, delta: float) -> None:
    (nll,) = losses(1, seed)
    tokens = torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)
    nll.requires_grad_()
    got = simnpo(nll, tokens, beta, delta)
    (grad,) = torch.autograd.grad(got.sum(), nll)
    x = beta * (nll.detach() / tokens - delta)
    torch.testing.assert_close(got.detach(), -2 / beta * torch.log(logistic(x)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, -2 / tokens * logistic(-x), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, beta=BETAS)
def test_dpo_value_and_gradient(seed: int, beta: float) -> None:
    preferred, preferred_ref, rejected, rejected_ref = losses(4, seed)
    for free in (preferred, preferred_ref, rejected, rejected_ref):
        free.requires_grad_()
    got = dpo(preferred, preferred_ref, rejected, rejected_ref, beta)
    got.sum().backward()
    with torch.no_grad():
        x = beta * ((preferred_ref - preferred) - (rejected_ref - rejected))
        torch.testing.assert_close(got.detach(), -2 / beta * torch.log(logistic(x)), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(rejected.grad, -2 * logistic(-x), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(preferred.grad, 2 * logistic(-x), rtol=1e-9, atol=1e-12)
    assert preferred_ref.grad is None
    assert rejected_ref.grad is None


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 5), v=st.integers(2, 20), seed=SEEDS)
def test_kl_against_scipy_and_its_gradient(n: int, v: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, reference = (2 * torch.randn(n, v, generator=g, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    got = kl_divergence(logits, reference)
    (grad,) = torch.autograd.grad(got.sum(), logits)
    p, q = (x.detach().softmax(-1) for x in (logits, reference))
    np.testing.assert_allclose(got.detach(), stats.entropy(q.numpy(), p.numpy(), axis=1), atol=1e-12)
    torch.testing.assert_close(grad, p - q, rtol=1e-9, atol=1e-12)
    assert float(kl_divergence(reference, reference).abs().max()) < 1e-12


def test_narrow_logits_are_widened() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert kl_divergence(logits, logits.flip(0)).dtype == torch.float32


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_positive(beta: float) -> None:
    one = torch.ones(1)
    for call in (
        lambda: npo(one, one, beta),
        lambda: simnpo(one, one, beta),
        lambda: dpo(one, one, one, one, beta),
    ):
        with pytest.raises(ConfigError, match="beta is"):
            call()


def test_npo_through_a_host_gives_the_gradient_of_the_undivided_model(
    nano: NanoEdge, parts: tuple[EdgePart, LocalLLM], remote: RemoteLLM, samples: list[Sample]
) -> None:
    """What a client computes around the host's cross-entropy, against autograd through the decoder itself."""
    data = ClientData(samples[:4], nano, FeatureCache(nano.edge))
    batch = nano(*data.batch(range(4)))
    tokens = (batch.labels != -100).sum(1)
    reference = torch.tensor([1.0, 4.0, 9.0, 2.0])

    def gradient(llm: LanguageModel) -> Tensor:
        embeds = batch.embeds.detach().requires_grad_()
        nll = llm.loss(embeds, batch.mask, batch.labels) * tokens
        return torch.autograd.grad(npo(nll, reference, 0.3).mean(), embeds)[0]

    embeds = batch.embeds.detach().requires_grad_()
    llm = parts[1]
    hidden = llm.part.decoder(
        inputs_embeds=embeds, attention_mask=batch.mask.long(), use_cache=False
    ).last_hidden_state
    log_p = llm.part.head(hidden)[:, :-1].log_softmax(-1)
    y = batch.labels[:, 1:]
    nll = -(log_p.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (y != -100)).sum(1)
    (expected,) = torch.autograd.grad(npo(nll, reference, 0.3).mean(), embeds)
    for got in (gradient(llm), gradient(remote)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
