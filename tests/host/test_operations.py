"""What operators use: reflection, logs for programs, readiness after the first pass."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tiny_host import make_batch, take_step, tiny_part

from fednano.errors import HostRefused
from fednano.host import HostSecurity, RemoteLLM, StaticTokens, serve
from fednano.host.loading import make_model
from fednano.host.logs import configure
from fednano.host.names import SERVICE
from fednano.models.language import LocalLLM


def test_reflection_tells_the_schema(local: LocalLLM) -> None:
    ask = reflection_pb2.ServerReflectionRequest
    with serve(local, grace=1.0) as host, grpc.insecure_channel(host.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, file, unknown = stub.ServerReflectionInfo(
            iter(
                [
                    ask(list_services=""),
                    ask(file_containing_symbol=SERVICE),
                    ask(file_containing_symbol="no.such.Thing"),
                ]
            ),
            timeout=10,
        )
    assert {service.name for service in listed.list_services_response.service} == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert any(b"ImageSpan" in data for data in file.file_descriptor_response.file_descriptor_proto)
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.fixture
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers = before
    root.setLevel(level)
    logging.getLogger("fednano.host.requests").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("own_logging")
def test_logs_for_programs_name_requests_and_nothing_they_hold(
    local: LocalLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("json", "INFO")
    secret = 52
    x, mask, labels = make_batch([4, 6])
    security = HostSecurity(verifier=StaticTokens({"site-a": b"a" * 32}))
    with (
        serve(local, grace=1.0, security=security) as host,
        RemoteLLM(host.address, insecure=True, token=b"a" * 32) as remote,
    ):
        take_step(remote, (x, mask, labels))
        with RemoteLLM(host.address, insecure=True, token=b"b" * 32) as stranger, pytest.raises(HostRefused):
            stranger.stats()
        # As a client that does not check would send it.
        remote._info = remote.describe()
        object.__setattr__(remote._info, "vocab_size", 10**6)
        wrong = torch.where(mask, secret + 10**5, labels)
        with pytest.raises(HostRefused, match=str(secret + 10**5)):
            remote.loss(x, mask, wrong)
    text = capsys.readouterr().err
    lines = [json.loads(line) for line in text.splitlines()]
    events = {line.get("event") for line in lines}
    assert events >= {"request done", "request refused", "pass"}
    done = next(line for line in lines if line.get("event") == "request done" and line["call"] == "step")
    assert (done["client"], done["samples"], done["tokens"]) == ("site-a", 2, 10)
    assert done["ms"] >= 0
    assert any(line.get("event") == "pass" and done["request"] in line["requests"] for line in lines)
    refused = [line for line in lines if line.get("event") == "request refused"]
    assert [(line["call"], line["reason"]) for line in refused] == [("stats", "auth"), ("step", "invalid")]
    assert refused[1]["request"]
    assert str(secret + 10**5) not in text


@pytest.mark.usefixtures("own_logging")
def test_logs_for_people_say_the_same(local: LocalLLM, capsys: pytest.CaptureFixture[str]) -> None:
    for level in ("DEBUG", "INFO"):
        configure("text", level)
        with serve(local, grace=1.0) as host, RemoteLLM(host.address, insecure=True) as remote:
            take_step(remote, make_batch([4]))
        said = 'DEBUG fednano.host.requests: request done call="step"' in capsys.readouterr().err
        assert said == (level == "DEBUG")  # a line for each request would be too many for people


def test_a_host_serves_only_after_a_first_pass() -> None:
    part, passes = tiny_part(), []
    part.decoder.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    make_model(
        Namespace(compile=False, cuda_graphs=False, batch_tokens=None, memory_gb=None, workers=1), part
    )
    assert passes == [True]
