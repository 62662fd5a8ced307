"""The factored exchange: the same gradients from a fraction of the bytes, whatever the host lets go of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fednano.adapters import create
from fednano.data import Sample
from fednano.errors import ConfigError, HostRefused
from fednano.host import HostSecurity, RemoteLLM, RunningHost, StaticTokens, serve
from fednano.host.kept import KeptSample, KeptSamples
from fednano.models.edge import EdgePart, NanoEdge
from fednano.models.factored import FactoredBatch, FactoredModel, StreamFactors
from fednano.models.language import LanguageModel, LocalLLM
from fednano.training.data import ClientData
from fednano.training.features import FeatureCache
from fednano.training.local import TrainSettings, train_local

Parts = tuple[EdgePart, LocalLLM]
ADAPTERS = [
    ("nano", {"rank": 3}),
    ("nano", {"rank": 5, "act": "gelu", "scale": 0.5}),
    ("lora", {"rank": 4, "alpha": 8.0}),
    ("ffa", {"rank": 4}),
    ("lora-xs", {"rank": 4}),
]


@pytest.fixture(scope="module")
def host(parts: Parts) -> Iterator[RunningHost]:
    with serve(parts[1], threads=1, grace=1.0) as running:
        yield running


def edge_with(
    parts: Parts, name: str, streams: tuple[str, ...] = ("image", "text"), **options: object
) -> NanoEdge:
    nano = NanoEdge(parts[0], {stream: create(name, **options) for stream in streams}, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in nano.layers.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return nano


def leaf_gradients(nano: NanoEdge, losses: Tensor, weights: Tensor) -> dict[str, Tensor]:
    nano.zero_grad()
    (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
    return {name: leaf.grad.clone() for name, leaf in nano.layers.named_parameters() if leaf.grad is not None}


def full_and_factored(
    nano: NanoEdge,
    local: LanguageModel,
    remote: FactoredModel,
    data: ClientData,
    indices: list[int],
    weights: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    prompts, features = data.batch(indices)
    batch = nano(prompts, features)
    whole = local.loss(batch.embeds, batch.mask, batch.labels)
    expected = leaf_gradients(nano, whole, weights)
    parts = nano.factor(prompts, features)
    assert parts is not None
    torch.testing.assert_close(parts.embeds(), batch.embeds)
    losses = remote.factored_loss(parts)
    return expected, leaf_gradients(nano, losses, weights), whole.detach(), losses.detach()


def test_frozen_parts_may_be_narrower_than_adapters() -> None:
    """A batch beyond the host's limits goes as a full one: adapters in float32 on a model in bfloat16 too."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 5, 8, generator=generator).bfloat16()
    where = torch.tensor([[True, True, False, False, False], [False, False, True, False, False]])
    z = torch.randn(3, 2, generator=generator).requires_grad_()
    up = torch.randn(2, 8, generator=generator).requires_grad_()
    mask, labels = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.int64)
    whole = FactoredBatch(raw, mask, labels, (StreamFactors(where, z, up),)).embeds()
    expected = raw.clone()
    expected[where] = (raw[where].float() + z @ up).bfloat16()
    assert torch.equal(whole, expected)
    assert all(part is not None for part in torch.autograd.grad(whole.float().sum(), (z, up)))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("name", "options"), ADAPTERS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(ADAPTERS)])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(0, 11), min_size=1, max_size=5), uneven=st.booleans())
def test_gradients_equal_those_of_the_full_exchange(
    name: str,
    options: dict[str, object],
    indices: list[int],
    uneven: bool,
    parts: Parts,
    host: RunningHost,
    samples: list[Sample],
) -> None:
    nano = edge_with(parts, name, **options)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    weights = torch.arange(1.0, len(indices) + 1) if uneven else torch.full((len(indices),), 1 / len(indices))
    with RemoteLLM(host.address, insecure=True, factored=True) as remote:
        expected, got, want, losses = full_and_factored(nano, parts[1], remote, data, indices, weights)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)
    assert set(got) == set(expected)
    whole = (
        torch.cat([got[n].flatten() for n in expected]),
        torch.cat([g.flatten() for g in expected.values()]),
    )
    assert relative(*whole) <= 1e-5


@pytest.mark.parametrize("streams", [("image",), ("text",)])
def test_one_stream_alone(
    streams: tuple[str, ...], parts: Parts, host: RunningHost, samples: list[Sample]
) -> None:
    nano = edge_with(parts, "nano", streams, rank=3)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    with RemoteLLM(host.address, insecure=True, factored=True) as remote:
        expected, got, _, _ = full_and_factored(nano, parts[1], remote, data, [0, 3, 5], torch.ones(3))
    for leaf, gradient in expected.items():
        assert relative(got[leaf], gradient) <= 1e-4, leaf


def test_a_second_step_sends_no_frozen_part(parts: Parts, host: RunningHost, samples: list[Sample]) -> None:
    nano = edge_with(parts, "nano", rank=1)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    with RemoteLLM(host.address, insecure=True, factored=True) as remote:
        for _ in range(2):
            first = remote.wire.step
            batch = nano.factor(*data.batch([0, 1, 2, 3]))
            assert batch is not None
            remote.factored_loss(batch).sum().backward()  # type: ignore[no-untyped-call]
        second = remote.wire.step - first
        tokens, width = int(batch.mask.sum()), nano.edge.hidden_size
        sizes = tokens * 4 + 2 * width * 4  # z of rank 1, and up of two streams
        assert sizes < second.sent_bytes < sizes + 300
        assert sizes < second.received_bytes < sizes + 100
        assert first.sent_bytes > tokens * width * 4
        assert second.samples == 4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.int8, 0.06)])
def test_narrow_wire_types(
    dtype: torch.dtype, bound: float, parts: Parts, host: RunningHost, samples: list[Sample]
) -> None:
    nano = edge_with(parts, "nano", rank=4)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    with RemoteLLM(host.address, insecure=True, factored=True, wire_dtype=dtype) as remote:
        expected, got, _, _ = full_and_factored(nano, parts[1], remote, data, [0, 1, 2], torch.ones(3))
    for leaf, gradient in expected.items():
        assert relative(got[leaf], gradient) <= bound, leaf
    with pytest.raises(ConfigError, match="float16"):
        RemoteLLM(host.address, insecure=True, factored=True, wire_dtype=torch.float16)


def test_coded_chunks_change_no_bit(parts: Parts, host: RunningHost, samples: list[Sample]) -> None:
    found, moved = [], []
    for lossless in (False, True):
        nano = edge_with(parts, "nano", rank=4)
        data = ClientData(samples, nano, FeatureCache(nano.edge))
        with RemoteLLM(
            host.address, insecure=True, factored=True, wire_dtype=torch.bfloat16, lossless=lossless
        ) as remote:
            _, got, _, _ = full_and_factored(nano, parts[1], remote, data, [0, 1, 2, 3], torch.ones(4))
            found.append(got)
            moved.append((remote.wire.step.sent_bytes, remote.wire.step.received_bytes))
    assert all(torch.equal(found[0][leaf], found[1][leaf]) for leaf in found[0])
    assert moved[1][0] < 0.85 * moved[0][0]  # kept samples are coded as well


def test_what_the_host_let_go_of_is_sent_again(parts: Parts, samples: list[Sample]) -> None:
    nano = edge_with(parts, "nano", rank=2)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    kept = KeptSamples(memory_bytes=1 << 20)
    with (
        serve(parts[1], threads=1, kept=kept, grace=1.0) as host,
        RemoteLLM(host.address, insecure=True, factored=True) as remote,
    ):
        expected, got, _, _ = full_and_factored(nano, parts[1], remote, data, [0, 1], torch.ones(2))
        kept.close()  # everything is gone
        _, again, _, _ = full_and_factored(nano, parts[1], remote, data, [0, 1, 2], torch.ones(3))
        assert host.stats()["refused_missing"] == 1
        assert set(again) == set(got) == set(expected)
    tiny = KeptSamples(memory_bytes=10)
    with (
        serve(parts[1], threads=1, kept=tiny, grace=1.0) as host,
        RemoteLLM(host.address, insecure=True, factored=True) as remote,
    ):
        batch = nano.factor(*data.batch([0]))
        assert batch is not None
        with pytest.raises(HostRefused, match="--keep-bytes"):
            remote.factored_loss(batch)


def test_a_sample_is_encoded_and_hashed_once(
    parts: Parts, host: RunningHost, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fednano.host.factored_client as exchange

    hashed: list[bytes] = []
    make = exchange.sample_key
    monkeypatch.setattr(exchange, "sample_key", lambda *parts: hashed.append(make(*parts)) or hashed[-1])
    nano = edge_with(parts, "nano", rank=2)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    with RemoteLLM(host.address, insecure=True, factored=True) as remote:
        for indices in ([0, 1], [1, 2], [2, 0]):
            _, got, _, _ = full_and_factored(nano, parts[1], remote, data, indices, torch.ones(2))
            assert got
        assert len(hashed) == 3
        # Equal questions about different images are different samples.
        prompts, features = data.batch([0, 0])
        assert features[0] is not None
        other = nano.factor(prompts, [features[0], features[0] + 1])
        assert other is not None
        assert other.names[0] != other.names[1]


def test_another_bearer_cannot_use_what_one_keeps(parts: Parts, samples: list[Sample]) -> None:
    nano = edge_with(parts, "nano", rank=2)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    tokens = {"a": b"a" * 32, "b": b"b" * 32}
    security = HostSecurity(verifier=StaticTokens(tokens))
    batch = nano.factor(*data.batch([0]))
    assert batch is not None
    with serve(parts[1], threads=1, security=security, grace=1.0) as host:
        for number, token in enumerate(tokens.values(), start=1):
            with RemoteLLM(host.address, insecure=True, factored=True, token=token) as remote:
                remote.factored_loss(batch)
                assert remote.stats()["kept_samples"] == number


def test_training_by_low_rank_parts_ends_where_training_by_embeddings_does(
    parts: Parts, host: RunningHost, samples: list[Sample]
) -> None:
    found = []
    for factored in (False, True):
        nano = edge_with(parts, "nano", rank=3)
        data = ClientData(samples, nano, FeatureCache(nano.edge))
        with RemoteLLM(host.address, insecure=True, factored=factored) as remote:
            plan = TrainSettings(samples=24, batch_size=4, optimizer="sgd", learning_rate=0.1)
            train_local(nano, remote, data, plan, seed=0, client="a", round_number=1)
            found.append((nano.travelling(), remote.wire.step))
    (full, wide), (low, narrow) = found
    for name, leaf in full.items():
        torch.testing.assert_close(low[name], leaf, rtol=1e-3, atol=1e-5)
    assert narrow.received_bytes < 0.5 * wide.received_bytes


def test_an_adapter_without_low_rank_form_takes_the_full_exchange(
    parts: Parts, host: RunningHost, samples: list[Sample]
) -> None:
    nano = NanoEdge(parts[0], {"text": create("loca", count=8)}, seed=0)
    data = ClientData(samples, nano, FeatureCache(nano.edge))
    assert nano.factor(*data.batch([0])) is None
    with RemoteLLM(host.address, insecure=True, factored=True) as remote:
        train_local(nano, remote, data, TrainSettings(samples=4), seed=0, client="a", round_number=1)
        assert remote.wire.step.samples == 4


def sample(value: int) -> KeptSample:
    return KeptSample(
        torch.full((4, 8), float(value)),
        torch.full((4,), value, dtype=torch.int32),
        torch.ones(4, dtype=torch.uint8),
        torch.tensor([[0, 1, value + 1]], dtype=torch.int32),
    )


def test_the_samples_used_last_lie_on_the_gpu_as_well() -> None:
    each, size = sample(0).rows.nbytes, sample(0).nbytes
    kept = KeptSamples(memory_bytes=2 * size, disk_bytes=size, gpu_bytes=2 * each)
    moved: list[int] = []

    def rows(value: int) -> torch.Tensor:
        def move(own: torch.Tensor) -> torch.Tensor:
            moved.append(value)
            return own.clone()

        found = kept.get("room", bytes([value]))
        assert found is not None
        return kept.rows("room", bytes([value]), found, move)

    for value in range(3):  # the first goes to the disk
        kept.put("room", bytes([value]), sample(value))
    for value in (0, 1, 0, 1):
        assert torch.equal(rows(value), sample(value).rows)
    assert moved == [0, 1]
    rows(2)  # takes the place of the one that was used longest ago
    assert kept.counters()["kept_gpu_bytes"] == 2 * each
    rows(1)
    rows(0)
    assert moved == [0, 1, 2, 0]
    kept.put("room", bytes([0]), sample(7))  # what was there under that name is not served any more
    assert torch.equal(rows(0), sample(7).rows)
    kept.put("room", bytes([5]), sample(5))
    kept.put("room", bytes([6]), sample(6))  # two of the four are dropped, and their copies with them
    assert kept.counters()["kept_gpu_bytes"] <= each
    other = kept.rows("other", bytes([6]), sample(6), torch.clone)  # another's room: computed, not kept
    assert torch.equal(other, sample(6).rows)
    assert kept.counters()["kept_gpu_bytes"] <= each
    kept.close()
    assert kept.counters() == dict.fromkeys(kept.counters(), 0)


def test_kept_samples_spill_to_disk_and_stay_within_bounds() -> None:
    size = sample(0).nbytes
    kept = KeptSamples(memory_bytes=2 * size, disk_bytes=2 * size)
    for value in range(5):
        kept.put("room", bytes([value]), sample(value))
    assert kept.counters() == {
        "kept_samples": 4,
        "kept_memory_bytes": 2 * size,
        "kept_disk_bytes": 2 * size,
        "kept_gpu_bytes": 0,
    }
    assert kept.get("room", bytes([0])) is None
    assert kept.get("other", bytes([4])) is None
    for value in (1, 2, 3, 4, 1):  # those on disk come back, others go there
        found = kept.get("room", bytes([value]))
        assert found is not None
        assert torch.equal(found.rows, sample(value).rows)
        assert torch.equal(found.labels, sample(value).labels)
        assert torch.equal(found.images, sample(value).images)
    kept.close()
    assert kept.counters()["kept_samples"] == 0
    with pytest.raises(ConfigError):
        KeptSamples(-1)
