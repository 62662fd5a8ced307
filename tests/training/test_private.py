"""DP-SGD in the client's step: every sample's gradient clipped, and the noise that the accountant counts on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from fednano.data import Sample
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LocalLLM
from fednano.privacy.dp import Noise
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.local import TrainSettings, adapter_leaves
from fednano.training.private import Private, private_gradient, sampling_of, train_private

Parts = tuple[EdgePart, LocalLLM]


class Silent(Noise):
    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)


def data_of(samples: list[Sample], nano: NanoEdge) -> ClientData:
    return ClientData(samples, nano, FeatureCache(nano.edge))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True),
    clip=st.sampled_from([1e-4, 0.05, 1e6]),
)
def test_a_step_sums_clipped_gradients_of_single_samples(
    chosen: list[int], clip: float, parts: Parts, nano: NanoEdge, samples: list[Sample]
) -> None:
    data, asked = data_of(samples, nano), TrainSettings(batch_size=4)
    leaves = adapter_leaves(nano)
    expected = {name: torch.zeros(leaf.shape, dtype=torch.float64) for name, leaf in leaves.items()}
    for index in chosen:
        batch = nano(*data.batch([index]))
        gradients = torch.autograd.grad(
            parts[1].loss(batch.embeds, batch.mask, batch.labels).sum(),
            list(leaves.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        for name, gradient in zip(leaves, gradients, strict=True):
            expected[name] += gradient.double() * min(1.0, clip / length) / 4
    found = private_gradient(nano, parts[1], data, chosen, list(leaves), Private(clip, 1.0), Silent(), asked)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3 * clip if clip < 1 else 1e-6)
    total = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
    assert total <= len(chosen) * clip / 4 * (1 + 1e-9)


def test_the_noise_of_a_step_has_the_promised_size(
    parts: Parts, nano: NanoEdge, samples: list[Sample]
) -> None:
    data, names = data_of(samples, nano), list(adapter_leaves(nano))
    noise, drawn = Noise(b"s" * 32), []
    for _ in range(150):  # nothing drawn: what is left is noise
        step = private_gradient(
            *(nano, parts[1], data, [], names), Private(0.5, 3.0), noise, TrainSettings(batch_size=4)
        )
        drawn += [value.reshape(-1) for value in step.values()]
    values = torch.cat(drawn).numpy()
    assert stats.kstest(values, "norm", args=(0.0, 3.0 * 0.5 / 4)).pvalue > 1e-3


def test_training_changes_all_but_frozen_leaves_and_tells_no_loss(
    parts: Parts, nano: NanoEdge, samples: list[Sample]
) -> None:
    data, asked = data_of(samples, nano), TrainSettings(samples=12, batch_size=4, proximal_mu=0.1)
    assert sampling_of(data, asked) == (4 / len(data), 3)
    before = {name: leaf.detach().clone() for name, leaf in adapter_leaves(nano).items()}
    outcome = train_private(
        nano, parts[1], data, asked, Private(1.0, 0.1), client="c", round_number=1, frozen=["text.A"]
    )
    assert math.isnan(outcome.loss)
    assert outcome.steps == 3
    after = adapter_leaves(nano)
    assert torch.equal(before["text.A"], after["text.A"])
    assert not any(torch.equal(leaf, after[name]) for name, leaf in before.items() if name != "text.A")


def test_little_noise_and_no_clipping_learn(parts: Parts, nano: NanoEdge, samples: list[Sample]) -> None:
    data = data_of(samples, nano)
    asked = TrainSettings(samples=96, batch_size=12, optimizer="adam", learning_rate=0.05)

    def loss() -> float:
        with torch.no_grad():
            batch = nano(*data.batch(list(range(12))))
            return float(parts[1].loss(batch.embeds, batch.mask, batch.labels).mean())

    before = loss()
    train_private(nano, parts[1], data, asked, Private(100.0, 1e-6), client="c", round_number=1)
    assert loss() < before - 0.01


def test_leaves_that_are_not_finite_end_the_round(
    parts: Parts, nano: NanoEdge, samples: list[Sample]
) -> None:
    from fednano.errors import TrainingDiverged

    asked = TrainSettings(samples=4, batch_size=4, optimizer="sgd", learning_rate=1e38)
    with pytest.raises(TrainingDiverged, match="dp-noise"):
        train_private(
            *(nano, parts[1], data_of(samples, nano), asked, Private(1e4, 1e4)), client="c", round_number=1
        )
