"""Certificates whose time is over or has not come, or clocks that are wrong: refused at every door, in words."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from federation_maker import Made, make_federation
from flwr.app import RecordDict

from fednano.deploy.client import client_up
from fednano.deploy.enrolment import enroll, renew_site
from fednano.deploy.provision import renew_server, sign
from fednano.deploy.server import server_up
from fednano.errors import ConfigError
from fednano.federation.config import RunConfig
from fednano.federation.messages import HostTicket, Instruction, Reply
from fednano.federation.tasks import carry_out
from fednano.host.cli import main as host_main
from fednano.security import authority
from fednano.security.authority import require_valid

SITE = "site-a"
DAYS = 365


def clock(monkeypatch: pytest.MonkeyPatch, **off: float) -> None:
    """Set this machine's clock wrong, as far as certificates go."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(**off)

    monkeypatch.setattr(authority, "datetime", Wrong)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_federation(tmp_path / "federation", SITE)


def site_task(made: Made) -> Reply:
    """What a site answers to a request."""
    node = {"site": SITE, "bundle": str(made.bundle(SITE).root), "data": "none"}
    asked = Instruction(RunConfig(), "federated", 1, HostTicket(), False, {}, {})
    content: RecordDict = asked.to_records()
    return Reply.from_records(carry_out("hello", content, node))


@pytest.mark.parametrize(
    ("off", "said"),
    [
        ({"days": DAYS + 1}, "expired at .* this machine's clock says .* Renew it: fednano deploy renew"),
        ({"hours": -2}, "is valid from .* this machine's clock says .* Set the clock right"),
    ],
)
def test_every_side_says_what_is_wrong_before_it_starts(
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    off: dict[str, float],
    said: str,
) -> None:
    clock(monkeypatch, **off)
    bundle = made.bundle(SITE).root
    with pytest.raises(ConfigError, match=f"certificate of {SITE} {said}"):
        client_up(bundle)
    with pytest.raises(ConfigError, match=f"certificate of server {said}"):
        server_up(made.place.root)
    assert host_main(["--model", "tiny", "--listen", "127.0.0.1:0", "--server", str(made.place.root)]) == 2
    assert re.search(f"certificate of server {said}", capsys.readouterr().err)
    assert not list(made.place.root.glob("state/*.log"))  # nothing was started
    # While it runs: the server is told by the site's answer, instead of by a connection that fails.
    failure = site_task(made).failure
    assert failure is not None
    assert f"certificate of {SITE}" in failure.message


def test_clocks_may_differ_by_an_hour(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for hours in (-0.9, 0.0, 0.9):
        clock(monkeypatch, hours=hours)
        failure = site_task(made).failure
        assert failure is not None  # of its data, which is not there
        assert "certificate" not in failure.message


def test_expired_certificates_can_be_renewed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    later = datetime.now(UTC) + timedelta(days=DAYS + 1)
    bundle = made.bundle(SITE).root
    clock(monkeypatch, days=DAYS + 1)
    renew_server(made.folder)
    enroll(sign(made.folder, renew_site(bundle)), bundle)
    for certificate in (made.place.credentials.certificate, made.bundle(SITE).credentials.certificate):
        require_valid(certificate, "", now=later)
