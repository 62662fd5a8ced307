"""The training loop and the Fisher with the project's kernels against the same without them.

Without a GPU, ``FEDNANO_KERNELS=on`` takes the same way through the loop and ends in the kernels' plain references; the
kernels themselves are held to those in tests/kernels.
"""

from __future__ import annotations

import pytest
import torch

from fednano.adapters import create
from fednano.data import Sample
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.language import LocalLLM
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.fisher import empirical_fisher
from fednano.training.local import TrainSettings, adapter_leaves, train_local
from fednano.training.steps import optimizer_steps

Parts = tuple[EdgePart, LocalLLM]


def _edge(parts: Parts, name: str, **options: object) -> NanoEdge:
    nano = NanoEdge(parts[0], {s: create(name, **options) for s in ("image", "text")}, seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        for leaf in adapter_leaves(nano).values():
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.2)
    return nano


@pytest.mark.parametrize(
    ("optimizer", "decay", "mu", "clip"),
    [("adam", 0.0, 0.0, 0.0), ("adamw", 0.1, 0.5, 0.0), ("adamw", 0.0, 0.5, 0.05), ("adam", 0.1, 0.0, 0.0)],
)
def test_a_round_is_the_same(
    optimizer: str,
    decay: float,
    mu: float,
    clip: float,
    parts: Parts,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = TrainSettings(
        samples=12,
        batch_size=2,  # one batch has no image at all: the image adapter's gradient is zero there
        optimizer=optimizer,
        weight_decay=decay,
        proximal_mu=mu,
        clip_norm=clip,
    )
    without_images = [Sample(s.id, None, s.question, s.answer) for s in samples[:2]]
    ends, losses = [], []
    for mode in ("off", "on"):
        monkeypatch.setenv("FEDNANO_KERNELS", mode)
        nano = _edge(parts, "nano", rank=3, act="gelu")
        data = ClientData(without_images + samples[2:], nano, FeatureCache(nano.edge))
        losses.append(train_local(nano, parts[1], data, settings, seed=1, client="a", round_number=1).loss)
        ends.append(nano.travelling())
        for leaf in adapter_leaves(nano).values():
            assert leaf.untyped_storage().nbytes() == leaf.nbytes, "the leaf keeps the whole buffer alive"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)


def test_the_kernel_makes_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option does what it says: with the kernels, every step is one call of `flat_adamw_` for all leaves."""
    import fednano_kernels

    calls: list[int] = []
    real = fednano_kernels.flat_adamw_

    def counted(w: torch.Tensor, *arguments: object, **options: object) -> None:
        calls.append(w.numel())
        real(w, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fednano_kernels, "flat_adamw_", counted)
    monkeypatch.setenv("FEDNANO_KERNELS", "on")
    leaves = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(5))]
    with optimizer_steps(leaves, "adamw", learning_rate=0.1) as steps:
        for _ in range(2):
            steps.zero_grad()
            (leaves[0].sum() + leaves[1].sum()).backward()
            steps.step()
    assert calls == [11, 11]
    assert all(bool((leaf < 0.9).all()) for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "options", "leaves"),
    [
        ("nano", {"rank": 3, "act": "gelu"}, 2),
        ("nano", {"rank": 24, "act": "linear", "scale": 0.5}, 2),  # as wide as the model: A and B are square
        ("lora", {"rank": 4}, 2),
        ("ffa", {"rank": 4}, 1),
    ],
    ids=["gelu", "square", "lora", "ffa"],
)
def test_fisher_is_the_same(
    name: str,
    options: dict[str, object],
    leaves: int,
    parts: Parts,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fednano_kernels

    nano = _edge(parts, name, **options)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    monkeypatch.setenv("FEDNANO_KERNELS", "off")
    plain = empirical_fisher(nano, parts[1], data, range(12), batch_size=5)
    assert len(plain) == 2 * leaves
    monkeypatch.setenv("FEDNANO_KERNELS", "on")
    calls: list[int] = []
    real = fednano_kernels.nano_adapter_fisher

    def counted(*arguments: object, **more: object) -> object:
        calls.append(1)
        return real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(fednano_kernels, "nano_adapter_fisher", counted)
    fused = empirical_fisher(nano, parts[1], data, range(12), batch_size=5)
    assert len(calls) == 2 * 3, "two streams, three batches"
    for leaf, value in plain.items():
        torch.testing.assert_close(fused[leaf], value, rtol=1e-4, atol=1e-10)
