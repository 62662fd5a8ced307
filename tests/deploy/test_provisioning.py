"""Invitations, requests, certificates: what is made, what travels, and who is turned away."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store
from federation_maker import Made, make_federation
from hypothesis import given, settings
from hypothesis import strategies as st

from fednano.deploy.enrolment import enroll, renew_site
from fednano.deploy.plan import EXAMPLE, Plan
from fednano.deploy.provision import init, invite, revoke, sign
from fednano.errors import ConfigError, FednanoError, RequestRefused
from fednano.security.authority import certificate_facts


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """For tests that change nothing."""
    return make_federation(tmp_path_factory.mktemp("federation"), "site-a", "site-b")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_federation(tmp_path / "federation", "site-a", "site-b")


def invitation(made: Made, site: str) -> Path:
    return made.folder / "invitations" / f"{site}.invitation.json"


def test_an_independent_verifier_accepts_the_certificates(shared: Made) -> None:
    own = shared.bundle("site-a").credentials
    store = Store([x509.load_pem_x509_certificate(own.root)])
    verifier = PolicyBuilder().store(store).time(datetime.now(UTC)).build_client_verifier()
    chain = verifier.verify(x509.load_pem_x509_certificate(own.certificate), []).chain
    assert len(chain) == 2
    server = PolicyBuilder().store(store).time(datetime.now(UTC))
    address = x509.IPAddress(ip_address("127.0.0.1"))
    server.build_server_verifier(address).verify(
        x509.load_pem_x509_certificate(shared.place.credentials.certificate), []
    )
    name, _, end = certificate_facts(own.certificate)
    assert name == "site-a"
    assert timedelta(days=364) < end - datetime.now(UTC) < timedelta(days=366)


def test_node_keys_are_what_flower_wants(shared: Made) -> None:
    bundle = shared.bundle("site-a")
    private = serialization.load_ssh_private_key((bundle.root / "node.key").read_bytes(), password=None)
    public = serialization.load_ssh_public_key((bundle.root / "node.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.curve.name == "secp384r1"
    assert private.public_key() == public


def test_private_keys_never_travel_and_are_readable_by_their_owner_only(shared: Made) -> None:
    secrets = {
        path
        for path in shared.folder.rglob("*")
        if path.is_file() and ("PRIVATE KEY" in path.read_text() or path.suffix == ".key")
    }
    assert {path.name for path in secrets} == {
        *("ca.key", "server.key", "tokens.key", "audit.key", "tls.key", "node.key")
    }
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)
    letters = [*shared.folder.rglob("*.request.json"), *shared.folder.rglob("*.signed.json")]
    assert len(letters) == 4
    keys = {path.read_bytes() for path in secrets}
    for letter in letters:
        assert not any(key in letter.read_bytes() for key in keys)


def _use_keys(made: Made) -> None:
    assert made.place.credentials
    made.place.issue("run", "site-a", 0)


@pytest.mark.parametrize("name", ["server.key", "tokens.key"])
def test_a_key_that_others_can_read_is_refused(made: Made, name: str) -> None:
    (made.place.root / name).chmod(0o640)
    with pytest.raises(ConfigError, match=r"can be read or written by others \(mode 0640\)"):
        _use_keys(made)


def test_a_site_key_that_others_can_read_is_refused(made: Made) -> None:
    bundle = made.bundle("site-a")
    (bundle.root / "tls.key").chmod(0o604)
    with pytest.raises(ConfigError, match="can be read or written by others"):
        assert bundle.credentials


def test_an_invitation_is_good_once(made: Made) -> None:
    request = made.folder / "site-a" / "site-a.request.json"
    with pytest.raises(RequestRefused, match="has been used or withdrawn"):
        sign(made.folder, request)


def test_an_older_invitation_is_void(made: Made, tmp_path: Path) -> None:
    invite(made.folder, "site-c")
    request = enroll(invitation(made, "site-c"), tmp_path / "c")
    invite(made.folder, "site-c")
    with pytest.raises(RequestRefused, match="not made with the newest invitation"):
        sign(made.folder, request)


@pytest.mark.parametrize("field", ["csr", "node_key", "site"])
def test_a_request_that_was_changed_on_its_way_is_refused(made: Made, tmp_path: Path, field: str) -> None:
    invite(made.folder, "site-c")
    request = enroll(invitation(made, "site-c"), tmp_path / "c")
    other = json.loads((made.folder / "site-a" / "site-a.request.json").read_text())
    said = json.loads(request.read_text())
    request.write_text(json.dumps({**said, field: other[field]}))
    with pytest.raises(RequestRefused):
        sign(made.folder, request)
    before = made.place.sites()
    request.write_text(json.dumps(said))
    assert sign(made.folder, request).exists()
    assert not before["site-c"].serial
    assert made.place.sites()["site-c"].serial


@pytest.mark.parametrize("name", ["../server", "/etc/passwd", "server", "", "a/b", ".hidden", "x" * 65])
def test_a_name_that_could_lead_elsewhere_is_refused(made: Made, name: str) -> None:
    request = made.folder / "site-a" / "site-a.request.json"
    said = json.loads(request.read_text())
    request.write_text(json.dumps({**said, "site": name}))
    files = sorted(made.folder.rglob("*"))
    with pytest.raises(RequestRefused, match="is not the name of a site"):
        sign(made.folder, request)
    with pytest.raises(FednanoError):
        invite(made.folder, name)
    assert sorted(made.folder.rglob("*")) == files


def test_renewal_keeps_the_node_and_takes_a_new_key(made: Made) -> None:
    bundle = made.bundle("site-a")
    with made.place.changing_sites() as sites:
        sites["site-a"] = sites["site-a"].__class__(**{**vars(sites["site-a"]), "node": 7})
    old_key, old = (bundle.root / "tls.key").read_bytes(), made.place.sites()["site-a"]
    request = renew_site(bundle.root)
    assert (bundle.root / "tls.key").read_bytes() == old_key  # in use until the answer is there
    enroll(sign(made.folder, request), bundle.root)
    new = made.place.sites()["site-a"]
    assert (bundle.root / "tls.key").read_bytes() != old_key
    assert (new.node, new.previous) == (7, old.serial)
    assert certificate_facts(bundle.credentials.certificate)[1] == new.serial
    with pytest.raises(RequestRefused, match="not its newest"):
        sign(made.folder, request)  # replayed


def test_a_renewal_in_anothers_name_is_refused(made: Made) -> None:
    request = renew_site(made.bundle("site-b").root)
    said = json.loads(request.read_text())
    request.write_text(json.dumps({**said, "site": "site-a"}))
    with pytest.raises(RequestRefused, match="not signed with the key of site-a"):
        sign(made.folder, request)


def test_a_revoked_site_cannot_renew_but_may_be_invited_anew(made: Made, tmp_path: Path) -> None:
    stolen = made.place.sites()["site-a"].serial
    revoke(made.folder, "site-a")
    with pytest.raises(RequestRefused, match="is revoked"):
        sign(made.folder, renew_site(made.bundle("site-a").root))
    invite(made.folder, "site-a")
    made.enroll("site-a", tmp_path / "again")
    back = made.place.sites()["site-a"]
    assert not back.revoked
    assert stolen not in (back.serial, back.previous)
    assert back.node == 0  # its new node key has yet to be registered


def test_a_certificate_of_another_federation_is_not_taken_in(made: Made, tmp_path: Path) -> None:
    other = make_federation(tmp_path / "other", "site-a")
    with pytest.raises(ConfigError, match="not signed by this federation's authority"):
        enroll(other.folder / "invitations" / "site-a.signed.json", made.bundle("site-a").root)


def test_keys_are_never_written_over(made: Made) -> None:
    with pytest.raises(ConfigError, match="never written over"):
        init(Plan("x", ("a",), ("h",)), made.folder)
    invite(made.folder, "site-a")
    with pytest.raises(ConfigError, match="never written over"):
        enroll(invitation(made, "site-a"), made.bundle("site-a").root)


def test_the_example_plan_is_one(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(EXAMPLE)
    plan = Plan.read(path)
    assert (plan.fleet, plan.language_host) == ("fl.example.org:9443", "fl.example.org:9444")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = 1", "lacks 'sites'"),
        ("name='x'\nsites=['a','a']\n[server]\nnames=['h']", "expected different names"),
        ("name='x'\nsites=['server']\n[server]\nnames=['h']", "none of them 'server'"),
        ("name='../x'\nsites=['a']\n[server]\nnames=['h']", "cannot be a name"),
        ("name='x'\nsites=['a']\n[server]\nnames=['h']\nfleet-prt=1", "Did you mean 'fleet-port'"),
        ("name='x'\nsites=['a']\n[server]\nnames=['h']\nfleet-port='1'", "expected int"),
        ("name='x'\nsites=['a']\n[server]\nnames=['h']\nfleet-port=9444", "expected two ports"),
        ("name='x'\nsites=['a']\n[server]\nnames=[]", "server.names is empty"),
        ("name='x'\nsites=['a']\n[server]\nnames=['h']\n[limits]\nopen-calls=0", "at least 1"),
        ("name='x'\nserver=3", "expected a table"),
        ("name=", "cannot be read"),
    ],
)
def test_a_wrong_plan_is_explained(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        Plan.read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_request_never_raises_anything_else(shared: Made, data: st.DataObject) -> None:
    good: dict[str, Any] = json.loads((shared.folder / "site-a" / "site-a.request.json").read_text())
    path = shared.folder / "fuzzed.json"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(st.binary(max_size=300)))
    else:
        name = data.draw(st.sampled_from(sorted(good)))
        path.write_text(json.dumps({**good, name: data.draw(JSON)}))
    with pytest.raises(FednanoError):
        sign(shared.folder, path)
    path.unlink()


def test_a_huge_request_is_not_read(shared: Made, tmp_path: Path) -> None:
    path = tmp_path / "bomb.json"
    path.write_bytes(b"[" * (1 << 20))
    with pytest.raises(ConfigError, match="more than 65536 bytes"):
        sign(shared.folder, path)
