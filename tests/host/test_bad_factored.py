"""Bad input to the factored exchange: refused with its reason, and the next step works."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tiny_host import POSITIONS, D, V

from fednano.host import RunningHost
from fednano.host.factored_codec import sample_key
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto.language_host_pb2_grpc import LanguageHostStub

TOKENS, RANK = 4, 2
ROWS = struct.pack(f"<{TOKENS * D}f", *[0.1] * (TOKENS * D))
LABELS = struct.pack(f"<{TOKENS}i", *[-100, 1, 1, 1])
STREAMS = bytes([0, 1, 1, 1])
KEY = sample_key(ROWS, LABELS, STREAMS)
NAN = struct.pack("<f", float("nan"))


@pytest.fixture(scope="module")
def stub(host: RunningHost) -> Iterator[Any]:
    with grpc.insecure_channel(host.address) as channel:
        yield LanguageHostStub(channel)


def keep(stub: Any, body: bytes, keys: list[bytes], **changes: Any) -> None:
    packed = pb.Packed(
        **{"dtype": pb.FLOAT32, "hidden_size": D, "lengths": [TOKENS], "scale": 1.0, **changes}
    )
    header = pb.KeepRequest(header=pb.KeepHeader(embeds=packed, keys=keys))
    list(stub.Keep(iter([header, pb.KeepRequest(chunk=body)]), timeout=20))


def step(stub: Any, body: bytes | None = None, **changes: Any) -> list[pb.StepReply]:
    given = {
        "objective": "cross_entropy",
        "keys": [KEY],
        "dtype": pb.FLOAT32,
        "ranks": [RANK],
        "want_gradient": True,
    }
    header = pb.FactoredRequest(header=pb.FactoredHeader(**{**given, **changes}))
    numbers = (TOKENS - 1) * RANK + RANK * D
    sent = struct.pack(f"<{numbers}f", *[0.1] * numbers) if body is None else body
    return list(stub.FactoredStep(iter([header, pb.FactoredRequest(chunk=sent)]), timeout=20))


def good(stub: Any) -> None:
    keep(stub, ROWS + LABELS + STREAMS, [KEY])
    assert len(step(stub)[0].header.losses) == 1


def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return dict(error.trailing_metadata()).get("fednano-reason", ""), error.details()


OTHER_LABELS = struct.pack(f"<{TOKENS}i", -100, 1, 1, V)
KEEPS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong key": ({"keys": [b"x" * 16]}, "sample 0 is called 7878"),
    "no key": ({"keys": []}, "keys: got 0, expected one for each of 1 samples"),
    "NaN": ({"body": NAN + ROWS[4:] + LABELS + STREAMS}, "embeds: sample 0 holds NaN"),
    "hidden size": ({"hidden_size": D + 1}, f"hidden_size: got {D + 1}, expected {D}"),
    "dtype": ({"dtype": 9}, "dtype: got wire code 9"),
    "batch of 0": ({"lengths": [], "keys": []}, "lengths: got no sample"),
    "empty sample": ({"lengths": [0]}, "lengths: sample 0 has no token"),
    "too long": ({"lengths": [POSITIONS + 1]}, "the model has"),
    "ten gigabytes": ({"lengths": [4_000_000_000]}, "request beyond max_tokens"),
    "short": ({"body": ROWS}, "keep: got"),
    "image": (
        {"images": [pb.ImageSpan(start=3, height=1, width=2)]},
        "images: sample 0 of 4 tokens has an image",
    ),
}
STEPS: dict[str, tuple[dict[str, Any], str, str]] = {
    "not kept": ({"keys": [b"?" * 16]}, "missing", r"samples \[0\] of this step are not kept"),
    "batch of 0": ({"keys": []}, "invalid", "lengths: got no sample"),
    "rank 0": ({"ranks": [0]}, "invalid", "ranks: got"),
    "rank beyond the width": ({"ranks": [D + 1]}, "invalid", "ranks: got"),
    "weights": ({"weights": [1.0, 1.0]}, "invalid", "weights: got 2"),
    "NaN weight": ({"weights": [float("nan")]}, "invalid", "weights: got a number that is not finite"),
    "float16": ({"dtype": pb.FLOAT16}, "invalid", "does not travel as float16"),
    "objective": ({"objective": "hinge"}, "invalid", "unknown objective 'hinge'"),
    "NaN": ({"body": NAN * ((TOKENS - 1) * RANK + RANK * D)}, "invalid", "embeds: sample 0 holds NaN"),
    "short": ({"body": b"1234"}, "invalid", "factored_step: got 4 bytes"),
    "another model": ({"fingerprint": "other"}, "model", "this host serves model"),
}


@pytest.mark.parametrize("what", list(KEEPS))
def test_bad_samples_are_not_kept(what: str, stub: Any) -> None:
    changes, says = KEEPS[what]
    given = {"body": ROWS + LABELS + STREAMS, "keys": [KEY], **changes}
    reason, text = refused(lambda: keep(stub, **given))
    assert reason == "invalid"
    assert says in text
    good(stub)


@pytest.mark.parametrize("what", list(STEPS))
def test_bad_factored_steps_are_refused(what: str, stub: Any) -> None:
    keep(stub, ROWS + LABELS + STREAMS, [KEY])
    changes, reason, says = STEPS[what]
    got, text = refused(lambda: step(stub, **changes))
    assert got == reason
    assert re.search(says, text)
    good(stub)


def test_labels_of_another_vocabulary_are_refused_when_they_are_used(stub: Any) -> None:
    key = sample_key(ROWS, OTHER_LABELS, STREAMS)
    keep(stub, ROWS + OTHER_LABELS + STREAMS, [key])
    reason, text = refused(lambda: step(stub, keys=[key]))
    assert reason == "invalid"
    assert f"labels: sample 0 has label {V}" in text
    good(stub)
