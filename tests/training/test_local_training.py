"""The training loop, its order of samples, its gradients through a host, and the per-sample Fisher."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fednano.data import Sample
from fednano.errors import ConfigError, DataError, TrainingDiverged
from fednano.host import RemoteLLM
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LanguageModel, LocalLLM
from fednano.training.answers import generate_answers
from fednano.training.data import ClientData, draw
from fednano.training.features import FeatureCache
from fednano.training.fisher import empirical_fisher, per_sample_gradients
from fednano.training.local import TrainSettings, train_local

Parts = tuple[EdgePart, LocalLLM]
SHARED = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def data_of(samples: list[Sample], nano: NanoEdge) -> ClientData:
    return ClientData(samples, nano, FeatureCache(nano.edge))


def gradients(
    nano: NanoEdge, llm: LanguageModel, data: ClientData, indices: list[int]
) -> dict[str, torch.Tensor]:
    nano.zero_grad()
    prompts, features = data.batch(indices)
    batch = nano(prompts, features)
    llm.loss(batch.embeds, batch.mask, batch.labels).mean().backward()
    return {name: leaf.grad.clone() for name, leaf in nano.layers.named_parameters() if leaf.grad is not None}


@SHARED
@given(indices=st.lists(st.integers(0, 11), min_size=1, max_size=8))
def test_adapter_gradients_through_the_host_equal_the_local_ones(
    indices: list[int], parts: Parts, remote: RemoteLLM, nano: NanoEdge, samples: list[Sample]
) -> None:
    data = data_of(samples, nano)
    here, there = gradients(nano, parts[1], data, indices), gradients(nano, remote, data, indices)
    assert set(here) == set(there)
    for name, gradient in here.items():
        assert torch.equal(there[name], gradient), name  # the same bits, so well within 1e-6


@SHARED
@given(indices=st.lists(st.integers(0, 11), min_size=1, max_size=6))
def test_per_sample_gradients_are_those_of_each_sample_alone(
    indices: list[int], parts: Parts, nano: NanoEdge, samples: list[Sample]
) -> None:
    data = data_of(samples, nano)
    together = per_sample_gradients(nano, parts[1], data, indices)
    for row, index in enumerate(indices):
        nano.zero_grad()
        prompts, features = data.batch([index])
        batch = nano(prompts, features)
        tokens = int((batch.labels != -100).sum())
        (parts[1].loss(batch.embeds, batch.mask, batch.labels).sum() * tokens).backward()
        for name, leaf in nano.layers.named_parameters():
            stream, _, short = name.partition(".theta.")
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(together[f"{stream}.{short}"][row], expected, rtol=2e-4, atol=2e-6)


def test_fisher_is_the_mean_of_squares_and_not_the_square_of_the_mean(
    parts: Parts, remote: RemoteLLM, nano: NanoEdge, samples: list[Sample]
) -> None:
    data, indices = data_of(samples, nano), list(range(12))
    fisher = empirical_fisher(nano, parts[1], data, indices, batch_size=5)
    each = per_sample_gradients(nano, parts[1], data, indices)
    for name, value in fisher.items():
        expected = each[name].double().square().mean(dim=0).float()
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-9)
        assert value.sum() > 1.5 * each[name].mean(dim=0).square().sum()
    hosted = empirical_fisher(nano, remote, data, indices, batch_size=4)
    for name, value in fisher.items():
        torch.testing.assert_close(hosted[name], value, rtol=1e-4, atol=1e-9)


@given(
    available=st.integers(1, 40), count=st.integers(1, 60), start=st.integers(0, 200), seed=st.integers(0, 9)
)
@settings(deadline=None)
def test_draws_join_into_whole_epochs(available: int, count: int, start: int, seed: int) -> None:
    whole = draw(available, start + count, seed=seed, client="a", start=0)
    assert draw(available, count, seed=seed, client="a", start=start) == whole[start:]
    for epoch in range((start + count) // available):
        assert Counter(whole[epoch * available : (epoch + 1) * available]) == Counter(range(available))


def test_clients_and_seeds_draw_differently() -> None:
    orders = {tuple(draw(50, 50, seed=s, client=c, start=0)) for s in (0, 1) for c in ("a", "b")}
    assert len(orders) == 4


def test_training_lowers_the_loss_and_repeats_to_the_bit(
    parts: Parts, nano: NanoEdge, samples: list[Sample]
) -> None:
    start = nano.travelling()
    data = data_of(samples, nano)
    runs = []
    for _ in range(2):
        nano.load_travelling(start)
        losses = [
            train_local(
                nano,
                parts[1],
                data,
                TrainSettings(samples=24, batch_size=6),
                seed=3,
                client="a",
                round_number=r,
            ).loss
            for r in (1, 2, 3, 4)
        ]
        runs.append((losses, nano.travelling()))
    assert runs[0][0] == runs[1][0]
    assert all(runs[0][1][name].equal(runs[1][1][name]) for name in start)
    assert runs[0][0][-1] < runs[0][0][0]


def test_one_proximal_step_is_fedprox(parts: Parts, nano: NanoEdge, samples: list[Sample]) -> None:
    """Two SGD steps by hand: the second one's gradient has mu (theta - theta_0) added."""
    start, rate, mu = nano.travelling(), 0.05, 0.7
    data = data_of(samples, nano)
    order = draw(12, 8, seed=0, client="a", start=0)
    settings_ = TrainSettings(samples=8, batch_size=4, optimizer="sgd", learning_rate=rate, proximal_mu=mu)
    train_local(nano, parts[1], data, settings_, seed=0, client="a", round_number=1)
    got = nano.travelling()
    nano.load_travelling(start)
    anchor = {name: leaf.detach().clone() for name, leaf in nano.layers.named_parameters()}
    for indices in (order[:4], order[4:]):
        grads = gradients(nano, parts[1], data, indices)
        with torch.no_grad():
            for name, leaf in nano.layers.named_parameters():
                leaf.sub_(rate * (grads[name] + mu * (leaf - anchor[name])))
    for name, leaf in nano.travelling().items():
        torch.testing.assert_close(got[name], leaf, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_leaves_the_adapters_alone(
    parts: Parts, nano: NanoEdge, samples: list[Sample]
) -> None:
    with torch.no_grad():
        nano.layer("image").theta["B"].fill_(float("inf"))
    before = nano.travelling()
    with pytest.raises(TrainingDiverged, match="client a, round 2, step 1"):
        train_local(
            nano,
            parts[1],
            data_of(samples, nano),
            TrainSettings(samples=4),
            seed=0,
            client="a",
            round_number=2,
        )
    assert all(before[name].equal(leaf) for name, leaf in nano.travelling().items())


def test_answers_do_not_depend_on_the_batch(
    parts: Parts, remote: RemoteLLM, nano: NanoEdge, samples: list[Sample]
) -> None:
    features = FeatureCache(nano.edge)
    alone = [generate_answers(nano, parts[1], features, [sample])[0] for sample in samples]
    assert generate_answers(nano, parts[1], features, samples, batch_size=5) == alone
    assert generate_answers(nano, remote, features, samples, batch_size=12) == alone


def test_no_samples_is_an_error(nano: NanoEdge) -> None:
    with pytest.raises(DataError, match="no samples"):
        data_of([], nano)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer", "lion", "optimizer is 'lion'"),
        ("samples", 0, "samples is 0"),
        ("learning_rate", 0.0, "learning_rate is 0.0"),
        ("proximal_mu", -1.0, "proximal_mu is -1.0"),
    ],
)
def test_settings_are_checked(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**{name: value})  # type: ignore[arg-type]
