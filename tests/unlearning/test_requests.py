"""Requests from outside: only what the owner signed, for this run, once and in time, is accepted."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fednano.errors import ConfigError, RequestRefused
from fednano.runs.tombstones import sample_hash
from fednano.security.keys import Signer, create_key, load_public, load_signer, salted_hash
from fednano.unlearning.jobs.job import now
from fednano.unlearning.jobs.registry import Policy, Registry
from fednano.unlearning.jobs.request import authenticate, request_key

RUN = "20260101-000000-test"
Make = Callable[..., dict[str, Any]]


def test_a_good_request_passes_and_holds_no_clear_text(envelope: Make, registry: Registry) -> None:
    made = envelope(kind="subject", name="Jane Doe", reason="Art. 17")
    assert authenticate(json.loads(json.dumps(made)), registry, run=RUN)["request"]["site"] == "client-000"
    text = json.dumps(made)
    assert "Jane" not in text
    assert "a/train/1" not in text


def test_the_same_wish_has_the_same_key_whatever_its_nonce(envelope: Make) -> None:
    one, two = envelope()["request"], envelope(ids=["a/train/2", "a/train/1"])["request"]
    assert one["nonce"] != two["nonce"]
    assert request_key(one) == request_key(two)
    assert request_key(envelope(ids=["a/train/2"])["request"]) != request_key(one)


def _unsigned(made: dict[str, Any], other: Signer) -> None:
    del made["signature"]


def _blank_signature(made: dict[str, Any], other: Signer) -> None:
    made["signature"] = ""


def _signature_of_another(made: dict[str, Any], other: Signer) -> None:
    made["signature"] = other.sign("unlearning request", b"x")


def _another_key(made: dict[str, Any], other: Signer) -> None:
    made["public_key"] = other.public


def _scope_grown(made: dict[str, Any], other: Signer) -> None:
    made["request"]["ids"] = sorted([*made["request"]["ids"], "0" * 64])


def _site_swapped(made: dict[str, Any], other: Signer) -> None:
    made["request"]["site"] = "client-001"


def _unknown_field(made: dict[str, Any], other: Signer) -> None:
    made["request"]["admin"] = True


def _nothing_to_forget(made: dict[str, Any], other: Signer) -> None:
    made["request"]["ids"] = []


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (_unsigned, "not signed"),
        (_blank_signature, "not signed"),
        (_signature_of_another, "does not fit"),
        (_another_key, "registered with"),
        (_scope_grown, "does not fit"),
        (_site_swapped, "no key is registered for site 'client-001'"),
        (_unknown_field, "unknown \\['admin'\\]"),
        (_nothing_to_forget, "no samples"),
    ],
)
def test_forged_requests_are_refused(
    attack: Callable[[dict[str, Any], Signer], None],
    message: str,
    envelope: Make,
    registry: Registry,
    tmp_path: Path,
) -> None:
    made = envelope()
    attack(made, create_key(tmp_path / "other", "mallory"))
    with pytest.raises(RequestRefused, match=message):
        authenticate(made, registry, run=RUN)


def test_a_site_cannot_sign_for_another(envelope: Make, registry: Registry, tmp_path: Path) -> None:
    mallory = create_key(tmp_path / "other", "client-001")
    both = registry.with_site("client-001", mallory.public, mallory.salt, known=["client-000", "client-001"])
    made = envelope(signer=mallory)
    assert authenticate(made, both, run=RUN)
    made["request"]["site"] = "client-000"
    with pytest.raises(RequestRefused, match="registered with"):
        authenticate(made, both, run=RUN)


def test_times_and_addressee(envelope: Make, registry: Registry) -> None:
    day = timedelta(days=1)
    with pytest.raises(RequestRefused, match="expired"):
        authenticate(envelope(), registry, run=RUN, moment=now() + 2 * day)
    with pytest.raises(RequestRefused, match="lies ahead"):
        authenticate(envelope(moment=now() + day), registry, run=RUN)
    with pytest.raises(RequestRefused, match="at most 7 days"):
        authenticate(envelope(lifetime=30 * day), registry, run=RUN)
    with pytest.raises(RequestRefused, match="meant for run"):
        authenticate(envelope(run="another"), registry, run=RUN)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_no_field_can_be_changed_after_signing(
    data: st.DataObject, envelope: Make, registry: Registry
) -> None:
    made = envelope(deadline="2099-01-01")
    forged = copy.deepcopy(made)
    name = data.draw(st.sampled_from(sorted(forged["request"])))
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())
    forged["request"][name] = data.draw(junk)
    if forged != made:
        with pytest.raises(RequestRefused):
            authenticate(forged, registry, run=RUN)


@given(
    junk=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_junk_is_refused_with_a_message(junk: object, registry: Registry) -> None:
    for content in (junk, {"request": junk, "public_key": "x", "signature": "y"}):
        with pytest.raises(RequestRefused):
            authenticate(content, registry, run=RUN)


class TestKeys:
    def test_files_are_private_and_never_written_over(self, tmp_path: Path) -> None:
        signer = create_key(tmp_path, "a")
        assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
        assert load_signer(tmp_path / "a.key").public == signer.public == load_public(tmp_path / "a.pub")
        with pytest.raises(ConfigError, match="never written over"):
            create_key(tmp_path, "a")

    @pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
    def test_a_key_that_others_can_read_is_refused(self, tmp_path: Path) -> None:
        create_key(tmp_path, "a")
        (tmp_path / "a.key").chmod(0o640)
        with pytest.raises(ConfigError, match=r"can be read or written by others \(mode 0640\)"):
            load_signer(tmp_path / "a.key")

    def test_other_files_are_no_keys(self, tmp_path: Path) -> None:
        (tmp_path / "a.key").write_text("hello")
        (tmp_path / "a.key").chmod(0o600)
        with pytest.raises(ConfigError, match="no private key"):
            load_signer(tmp_path / "a.key")
        with pytest.raises(ConfigError, match="cannot read"):
            load_signer(tmp_path / "b.key")
        with pytest.raises(ConfigError, match="no public key"):
            load_public(tmp_path / "a.key")
        with pytest.raises(ConfigError, match="cannot be a name"):
            create_key(tmp_path, "../x")

    def test_a_salt_is_the_sites_own_and_one_hash_serves_requests_and_tombstones(
        self, tmp_path: Path
    ) -> None:
        one, two = create_key(tmp_path, "a"), create_key(tmp_path, "b")
        assert one.salt != two.salt
        assert load_signer(tmp_path / "a.key").salt == one.salt
        assert salted_hash(one.salt, "sample", "x/1") == sample_hash(one.salt, "x/1")
        assert sample_hash(one.salt, "x/1") != sample_hash(two.salt, "x/1")


class TestRegistry:
    def test_it_comes_back_from_its_file_and_is_private(self, registry: Registry) -> None:
        registry.save()
        assert Registry.load(registry.path) == registry
        assert stat.S_IMODE(registry.path.stat().st_mode) == 0o600

    def test_one_key_speaks_for_one_party(self, registry: Registry, signer: Signer, tmp_path: Path) -> None:
        known = ["client-000", "client-001"]
        with pytest.raises(ConfigError, match="belongs to site 'client-000'"):
            registry.with_approver("boss", signer.public)
        with pytest.raises(ConfigError, match="belongs to site"):
            registry.with_site("client-001", signer.public, signer.salt, known=known)
        other = create_key(tmp_path, "x")
        with pytest.raises(ConfigError, match="is registered with the key"):
            registry.with_site("client-000", other.public, other.salt, known=known)
        with pytest.raises(ConfigError, match="took no part"):
            registry.with_site("client-009", other.public, other.salt, known=known)
        two = registry.with_approver("boss", other.public)
        with pytest.raises(ConfigError, match="belongs to approver"):
            two.with_approver("deputy", other.public)

    def test_two_approvals_cannot_be_waived(self) -> None:
        with pytest.raises(ConfigError, match="approvals for scope 'client'"):
            Policy(approvals={"samples": 0, "subject": 0, "class": 2, "client": 1})

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "registry.json"
        path.write_text('{"sites": []}')
        with pytest.raises(ConfigError, match="no registry of keys"):
            Registry.load(path)
