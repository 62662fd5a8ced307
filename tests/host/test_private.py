"""Label-private steps: the same numbers, and no label on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_host import D, make_batch, take_step

from fednano.errors import ConfigError, HostRefused
from fednano.host import RemoteLLM, RunningHost, codec, serve
from fednano.host.private_compute import Graphs, check_labelled
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto.language_host_pb2_grpc import LanguageHostStub
from fednano.models.language import LocalLLM
from fednano.models.load import load_head, load_language
from fednano.models.private import HiddenStep


@pytest.fixture(scope="module")
def remote(host: RunningHost, local: LocalLLM) -> Iterator[RemoteLLM]:
    with RemoteLLM(host.address, insecure=True, head=local.part.head, retry_seconds=5) as llm:
        yield llm


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(2, 16), st.integers(0, 5)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients_are_those_of_an_ordinary_step(
    rows: list[tuple[int, int]], seed: int, remote: RemoteLLM, local: LocalLLM
) -> None:
    batch = make_batch([n for n, _ in rows], [p for _, p in rows], seed)
    weights = torch.linspace(0.5, 2.0, len(rows))
    for got, want in zip(take_step(remote, batch, weights), take_step(local, batch, weights), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(remote.loss(*batch), local.loss(*batch), rtol=1e-5, atol=1e-7)


def test_graphs_that_were_let_go_of_are_computed_again(local: LocalLLM) -> None:
    batch = make_batch([4, 9, 6], seed=3)
    with (
        serve(local, keep_graphs=0) as host,
        RemoteLLM(host.address, insecure=True, head=local.part.head) as remote,
    ):
        for got, want in zip(take_step(remote, batch), take_step(local, batch), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        assert host.stats()["private_step_replayed"] == 1
    graphs = Graphs(1)
    steps = [HiddenStep(local.passes, x, mask, torch.where(y >= 0, 0, y)) for x, mask, y in (batch, batch)]
    states = [step.states(keep=True) for step in steps]
    for step in steps:
        graphs.add(step)  # the second takes the first's place
    gradients = [step.backward(torch.ones_like(hidden)) for step, hidden in zip(steps, states, strict=True)]
    assert [step.replayed for step in steps] == [1, 0]
    torch.testing.assert_close(*gradients)


def test_the_host_is_told_where_labels_are_and_not_what_they_are(
    local: LocalLLM, host: RunningHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fednano.host.exchange import Exchange

    sent: list[bytes] = []
    stream = Exchange.stream

    def spy(self: Exchange, requests: Iterator[Any], reply: Any) -> Iterator[Any]:
        def seen() -> Iterator[Any]:
            for request in requests:
                if request.WhichOneof("frame") == "header":
                    request.header.request_id = ""
                sent.append(request.SerializeToString())
                yield request

        return stream(self, seen(), reply)

    monkeypatch.setattr(Exchange, "stream", spy)
    embeds, mask, labels = make_batch([5, 7], seed=8)
    others = torch.where(labels >= 0, (labels + 11) % local.vocab_size, labels)
    frames = []
    for chosen in (labels, others):
        sent.clear()
        with RemoteLLM(host.address, insecure=True, head=local.part.head) as llm, torch.no_grad():
            llm.loss(embeds, mask, chosen)
        frames.append(list(sent))
    assert frames[0] == frames[1]  # nothing that went up depends on the labels
    assert host.stats().get("step_requests", 0) == 0


def test_narrow_wire_types_and_options() -> None:
    with pytest.raises(ConfigError, match="factored and head exclude each other"):
        RemoteLLM("127.0.0.1:1", insecure=True, factored=True, head=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_narrow_wire_types(dtype: torch.dtype, local: LocalLLM, host: RunningHost) -> None:
    batch = make_batch([6, 9], seed=2)
    with RemoteLLM(host.address, insecure=True, head=local.part.head, wire_dtype=dtype) as llm:
        for got, want in zip(take_step(llm, batch), take_step(local, batch), strict=True):
            assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([1, 1, 4], "ascending places below 8"),
        ([1, 8], "ascending places below 8"),
        ([1], "sample 1 has no label after its first token"),
        ([1, 3, 4], "the first token of sample 1 cannot be predicted"),
        ([], "sample 0 has no label"),
    ],
)
def test_bad_places_are_refused(places: list[int], message: str, host: RunningHost) -> None:
    with pytest.raises(HostRefused, match=message):
        check_labelled(places, [3, 5])
    packed, _ = codec.pack(torch.zeros(8, D), torch.float32, [3, 5])
    frame = pb.PrivateRequest(header=pb.PrivateHeader(embeds=packed, labelled=places))
    with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(LanguageHostStub(channel).PrivateStep(iter([frame]), timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert host.stats()["in_flight"] == 0


def test_a_bad_second_half_is_refused_and_frees_its_place(host: RunningHost) -> None:
    packed, data = codec.pack(torch.zeros(8, D), torch.float32, [3, 5])
    header = pb.PrivateHeader(embeds=packed, labelled=[1, 5], want_gradient=True)
    start = [pb.PrivateRequest(header=header), pb.PrivateRequest(chunk=bytes(data))]
    back, nan = codec.pack(torch.full((2, D), float("nan")), torch.float32, [1, 1])
    wide, _ = codec.pack(torch.zeros(2, D + 1), torch.float32, [1, 1])
    for rest, message in (
        ([pb.PrivateRequest(gradient=back), pb.PrivateRequest(chunk=bytes(nan))], "NaN"),
        ([pb.PrivateRequest(gradient=wide)], "expected the width and type"),
        ([pb.PrivateRequest(chunk=b"x")], "expected the header of a gradient"),
        ([], "expected the header of a gradient"),
    ):
        with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError, match=message):
            list(LanguageHostStub(channel).PrivateStep(iter([*start, *rest]), timeout=20))
    assert host.stats()["in_flight"] == host.stats()["buffered_bytes"] == 0


def test_the_head_alone_is_that_of_the_host() -> None:
    head, part = load_head("tiny"), load_language("tiny")
    assert torch.equal(head.weight, part.head.weight)  # type: ignore[arg-type]
