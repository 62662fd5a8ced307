"""Run tokens: what a signature covers, and that nothing else is believed."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.errors import ConfigError, RequestRefused
from fednano.security.canonical import canonical
from fednano.security.keys import Signer, create_key
from fednano.security.tokens import Allowance, RunToken, check_token, sign_token


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return create_key(tmp_path_factory.mktemp("keys"), "tokens")


def token(**changes: object) -> RunToken:
    made = RunToken("hospitals", "20260101-run", "site-a", int(time.time()) + 60)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_token_says_what_was_signed(signer: Signer) -> None:
    said = token(allowance=Allowance(calls_per_minute=7))
    assert check_token(sign_token(said, signer), [signer.public], "hospitals") == said
    assert said.bearer == "20260101-run/site-a"


def test_tokens_of_others_are_unknown(signer: Signer, tmp_path: Path) -> None:
    other = create_key(tmp_path, "other")
    with pytest.raises(RequestRefused, match="not signed by this federation's server"):
        check_token(sign_token(token(), other), [signer.public], "hospitals")
    raw = bytes.fromhex(signer.sign("audit log", canonical(asdict(token())))) + canonical(asdict(token()))
    with pytest.raises(RequestRefused, match="not signed"):  # a signature made for another purpose
        check_token(raw, [signer.public], "hospitals")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expires": int(time.time()) - 5}, "expired"),
        ({"issued": int(time.time()) + 3600}, "issued .* in the future: set the clocks right"),
        ({"federation": "banks"}, "for federation 'banks'"),
        ({"run": "../../etc"}, "a name in it is not one"),
        ({"site": "a/b"}, "a name in it is not one"),
        ({"site": ""}, "a name in it is not one"),
        ({"expires": 1e300}, "a time in it is not one"),
        ({"expires": True}, "a time in it is not one"),
    ],
)
def test_even_a_signed_token_is_looked_at(signer: Signer, changes: dict[str, object], said: str) -> None:
    with pytest.raises(RequestRefused, match=said):
        check_token(sign_token(token(**changes), signer), [signer.public], "hospitals")


def test_clocks_may_differ_a_little(signer: Signer) -> None:
    raw = sign_token(token(), signer)
    assert check_token(raw, [signer.public], "hospitals", now=lambda: time.time() - 55)
    with pytest.raises(RequestRefused, match="in the future"):
        check_token(raw, [signer.public], "hospitals", now=lambda: time.time() - 120)


@given(at=st.integers(0, 10_000), change=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_no_byte_of_a_token_is_free(signer: Signer, at: int, change: int) -> None:
    raw = bytearray(sign_token(token(), signer))
    raw[at % len(raw)] ^= change
    with pytest.raises(RequestRefused):
        check_token(bytes(raw), [signer.public], "hospitals")


@given(body=st.binary(max_size=2100))
@settings(max_examples=100, deadline=None)
def test_signed_rubbish_ends_in_one_error(signer: Signer, body: bytes) -> None:
    raw = bytes.fromhex(signer.sign("run token", body)) + body
    with pytest.raises(RequestRefused):
        check_token(raw, [signer.public], "hospitals")


@pytest.mark.parametrize("allowance", [None, [], {"open_calls": 0}, {"bytes": 1}, {"open_calls": 1.5}])
def test_a_signed_allowance_is_looked_at(signer: Signer, allowance: object) -> None:
    body = canonical(json.loads(json.dumps({**asdict(token()), "allowance": allowance})))
    with pytest.raises(RequestRefused, match="cannot be read"):
        check_token(bytes.fromhex(signer.sign("run token", body)) + body, [signer.public], "hospitals")
    with pytest.raises(ConfigError, match="expected a whole number"):
        Allowance(open_calls=0)
