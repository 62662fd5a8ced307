"""Every parser that faces the network: whatever comes, the answer is a result or its own error, in bounded memory.

``make fuzz`` gives them a million inputs; by default some hundred each. ``FEDNANO_FUZZ`` sets how many.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from fednano.aggregation import Refusal
from fednano.deploy.gateway import Gateway, GatewayLimits, _TurnedAwayError
from fednano.errors import FednanoError, HostRefused, RequestRefused, UpdateRefused
from fednano.federation.messages import Reply, decode_tensors, encode_tensors
from fednano.federation.uplink import codec_for, pack_fisher, pack_update, unpack_fisher, unpack_update
from fednano.host import HostLimits
from fednano.host.calls import Trace
from fednano.host.codec import raw
from fednano.host.planes import expand, squeeze
from fednano.host.pool import ComputePool
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.security import TokenRefusedError, parse_bearer
from fednano.host.service import LanguageHost
from fednano.host.stats import Stats
from fednano.security.authority import certificate_facts
from fednano.security.canonical import canonical, parse_canonical
from fednano.security.keys import Signer, create_key
from fednano.security.tokens import RunToken, check_token, sign_token

fuzzed = settings(
    max_examples=int(os.environ.get("FEDNANO_FUZZ", "120")),
    deadline=None,
    derandomize="FEDNANO_FUZZ" not in os.environ,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Good bytes with some of them changed, cut, doubled or replaced; sometimes no good bytes at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    body = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(body)))
        match draw(st.integers(0, 4)):
            case 0 if body:
                body[at % len(body)] = draw(st.integers(0, 255))
            case 1:
                body[at : at + draw(st.integers(1, 40))] = b""
            case 2:
                body[at:at] = draw(st.binary(max_size=20))
            case 3:
                body[at:at] = body[at : at + 30]
            case _:
                number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
                body[at : at + 8] = struct.pack("<Q", number)
    return bytes(body)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return create_key(tmp_path_factory.mktemp("keys"), "tokens")


@given(data=st.data())
@fuzzed
def test_tokens(signer: Signer, data: st.DataObject) -> None:
    good = sign_token(RunToken("hospitals", "run", "site-a", int(time.time()) + 60), signer)
    raw = data.draw(damaged(good))
    if data.draw(st.booleans()):  # signed by the server itself, so that what follows the signature is reached
        raw = bytes.fromhex(signer.sign("run token", raw[64:])) + raw[64:]
    try:
        token = check_token(raw, [signer.public], "hospitals")
    except RequestRefused:
        return
    assert (token.federation, token.site) == ("hospitals", "site-a") or raw[64:] != good[64:]


@given(text=st.none() | st.text(max_size=60) | st.text(max_size=60).map("Bearer ".__add__))
@fuzzed
def test_bearers(text: str | None) -> None:
    with contextlib.suppress(TokenRefusedError):
        assert isinstance(parse_bearer(text), bytes)


@pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")  # and is refused then
@given(data=st.data())
@fuzzed
def test_certificates(data: st.DataObject) -> None:
    with contextlib.suppress(ValueError):
        _, serial, _ = certificate_facts(data.draw(damaged(_certificate())))
        assert int(serial, 16) > 0


@lru_cache(maxsize=1)
def _certificate() -> bytes:
    from tempfile import TemporaryDirectory

    from fednano.security.authority import Authority, new_key

    with TemporaryDirectory() as folder:
        return Authority.create(Path(folder), "h").issue_server(new_key().public_key(), ["h"], 1)


@given(data=st.data())
@fuzzed
def test_canonical_json(data: st.DataObject) -> None:
    good = canonical({"a": [1, 2.5, None, True], "b": {"c": "ä\n"}})
    raw = data.draw(damaged(good))
    with contextlib.suppress(ValueError):
        assert canonical(parse_canonical(raw)) == raw


def _leaves() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(4, 6, generator=generator) for name in ("image.A", "text.B")}


def _bytes(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _record(blob: bytes) -> ArrayRecord:
    stype = encode_tensors({})["tensors"].stype
    return ArrayRecord({"tensors": Array(dtype="uint8", shape=(len(blob),), stype=stype, data=blob)})


@given(data=st.data())
@fuzzed
def test_safetensors(data: st.DataObject) -> None:
    good = encode_tensors(_leaves())["tensors"].data
    try:
        decoded = decode_tensors(_record(data.draw(damaged(good))))
    except UpdateRefused:
        return
    assert sum(tensor.nbytes for tensor in decoded.values()) <= len(good) + 400


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}',
        b'{"a":{"dtype":"F32","shape":[0,9223372036854775807,9223372036854775807],"data_offsets":[0,0]}}',
        b'{"../../etc/passwd":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
    ids=["arrays", "objects", "terabytes", "offset", "empty", "path"],
)
def test_safetensors_bombs(header: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blob = struct.pack("<Q", len(header)) + header + b"\0\0\0\0"
    try:
        decoded = decode_tensors(_record(blob))
    except UpdateRefused:
        decoded = {}
    assert sum(tensor.nbytes for tensor in decoded.values()) <= len(blob)
    assert not list(tmp_path.iterdir())


SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(max_size=10), st.binary(max_size=10)
)
NAMES = st.sampled_from(["client", "round", "error-kind", "error", "loss", "samples"]) | st.text(max_size=5)


@given(
    head=st.dictionaries(NAMES, SCALARS | st.lists(st.integers(0, 9), max_size=3), max_size=5),
    facts=st.dictionaries(NAMES, SCALARS, max_size=4),
    metrics=st.dictionaries(NAMES, st.floats() | st.lists(st.floats(), max_size=3), max_size=4),
    left_out=st.sets(st.sampled_from(["head", "facts", "metrics"]), max_size=1),
    blob=st.none() | st.binary(max_size=60),
)
@example(head={"client": "a", "round": math.inf}, facts={}, metrics={}, left_out=set(), blob=None)
@example(head={"client": "a", "round": 0, "error": "x"}, facts={}, metrics={}, left_out=set(), blob=None)
@fuzzed
def test_replies(
    head: dict[str, Any],
    facts: dict[str, Any],
    metrics: dict[str, Any],
    left_out: set[str],
    blob: bytes | None,
) -> None:
    records: dict[str, Any] = {
        "head": ConfigRecord(head),
        "facts": ConfigRecord(facts),
        "metrics": MetricRecord(metrics),
    }
    content = RecordDict({name: record for name, record in records.items() if name not in left_out})
    if blob is not None:
        content["leaves"] = _record(blob)
    try:
        reply = Reply.from_records(content)
    except UpdateRefused:
        return
    assert isinstance(reply.client, str)
    assert isinstance(reply.round, int)
    assert all(isinstance(value, float) for value in reply.metrics.values())


@pytest.mark.parametrize("name", ["bf16", "fp16", "int8", "int4", "sign", "topk", "dct"])
@given(data=st.data())
@fuzzed
def test_encoded_updates(name: str, data: st.DataObject) -> None:
    codec = codec_for(name, "")
    assert codec is not None
    current = _leaves()
    trained = {key: leaf + 0.1 for key, leaf in current.items()}
    blob, _, _ = pack_update(codec, trained, current, {})
    ((key, payload),) = blob.items()
    raw = data.draw(damaged(payload.numpy().tobytes()))
    if data.draw(st.booleans()):
        raw = (raw + bytes(len(payload)))[: len(payload)]
    try:
        decoded = unpack_update(codec, {key: _bytes(raw or b"\0")}, current, current)
    except Refusal:
        return
    assert {key: leaf.shape for key, leaf in decoded.items()} == {
        key: leaf.shape for key, leaf in current.items()
    }


@given(data=st.data())
@fuzzed
def test_encoded_fishers(data: st.DataObject) -> None:
    current = _leaves()
    ((key, payload),) = pack_fisher({name: leaf.abs() for name, leaf in current.items()}).items()
    raw = (data.draw(damaged(payload.numpy().tobytes())) + bytes(len(payload)))[: len(payload)]
    try:
        decoded = unpack_fisher({key: _bytes(raw)}, current, current)
    except Refusal:
        return
    assert all(bool((leaf >= 0).all()) for leaf in decoded.values())


@pytest.fixture(scope="module")
def service() -> LanguageHost:
    part = SimpleNamespace(hidden_size=24, fingerprint="f", max_positions=64, vocab_size=53)
    limits = HostLimits(max_request_bytes=1 << 20)
    stats = Stats()
    model: Any = SimpleNamespace(part=part, device=torch.device("cpu"))
    return LanguageHost(model, ComputePool(limits, stats), limits, stats)


PACKED = pb.Packed(dtype=pb.FLOAT32, hidden_size=24, lengths=[3, 5], scale=1.0)
HEADERS: dict[str, tuple[Message, Callable[[LanguageHost, Any], int]]] = {
    "step": (pb.StepHeader(objective="cross_entropy", embeds=PACKED), lambda s, h: s._sizes(h, per_token=4)),
    "keep": (pb.KeepHeader(embeds=PACKED, keys=[b"k" * 32] * 2), lambda s, h: s._sizes(h, per_token=5)),
    "generate": (
        pb.GenerateHeader(embeds=PACKED, max_new_tokens=3),
        lambda s, h: s._sizes(h, new_tokens=h.max_new_tokens),
    ),
    "factored": (
        pb.FactoredHeader(keys=[b"k" * 32], ranks=[4], dtype=pb.FLOAT32),
        lambda s, h: s._kept_samples(h, Trace("factored_step", "peer"))[1],
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
@given(data=st.data())
@fuzzed
def test_host_headers(service: LanguageHost, kind: str, data: st.DataObject) -> None:
    """No header makes the host set aside more than its limits say, whatever it announces."""
    good, sizes = HEADERS[kind]
    with contextlib.suppress(DecodeError, HostRefused):
        header = type(good).FromString(data.draw(damaged(good.SerializeToString())))
        assert 0 < sizes(service, header) <= 1 << 20


@given(data=st.data())
@fuzzed
def test_coded_chunks(data: st.DataObject) -> None:
    """What comes apart has the announced size; what is not coded as it says is refused."""
    numbers = torch.randn(2_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    good = squeeze(raw(numbers))
    assert good is not None
    room = data.draw(st.sampled_from([1, 3_999, 4_000, 1 << 30]))
    coded = data.draw(damaged(good))
    try:
        found = expand(coded, room)
    except HostRefused:
        return
    assert len(found) == int.from_bytes(coded[:4], "little") <= room


@given(data=st.data())
@fuzzed
def test_gateway_heads(data: st.DataObject) -> None:
    """Whatever the bytes, what would be passed on is a call of the fleet."""
    gateway = object.__new__(Gateway)
    gateway._limits = GatewayLimits()
    good = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: h\r\ncontent-length: 3\r\n\r\nabc"
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16_384)
    with contextlib.suppress(h11.RemoteProtocolError, _TurnedAwayError):
        connection.receive_data(data.draw(damaged(good)))
        head = connection.next_event()
        if isinstance(head, h11.Request):
            gateway._check(head)
            assert head.method == b"POST"
            assert head.target.startswith(b"/v1/fleet/")
            assert b".." not in head.target.split(b"?")[0]


@given(data=st.data())
@fuzzed
def test_letters(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    from fednano.deploy.letters import load_letter, named

    path = _folder(tmp_path_factory) / "letter.json"
    good = {"kind": "request", "site": "site-a", "csr": "x", "node_key": "y", "proof": "z"}
    path.write_bytes(data.draw(damaged(json.dumps(good).encode())))
    with contextlib.suppress(FednanoError):
        letter = load_letter(path, {"request", "renewal"})
        assert "/" not in named(letter)


_made: list[Path] = []


def _folder(factory: pytest.TempPathFactory) -> Path:
    if not _made:
        _made.append(factory.mktemp("letters"))
    return _made[0]
