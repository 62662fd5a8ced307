"""A federation's host among strangers, thieves and clumsy neighbours: all refused, and others served all the while."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from tiny_host import D, make_batch, take_step

from fednano.errors import HostError, HostRefused, HostUnavailable
from fednano.host import HostLimits, HostSecurity, RemoteLLM, RunningHost, RunTokens, serve
from fednano.host.pool import BusyError
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto.language_host_pb2_grpc import LanguageHostStub
from fednano.host.quota import Quotas
from fednano.host.security import bearer
from fednano.models.language import LocalLLM
from fednano.security import authority
from fednano.security.authority import Authority, new_key, private_pem, request_certificate
from fednano.security.place import Credentials
from fednano.security.tokens import Allowance

sys.path.insert(0, str(Path(__file__).parents[1] / "deploy"))

from federation_maker import Made, make_federation

RUN = "20260101-000000-run"
LIMITS = HostLimits(idle_seconds=2.5, slowest_bytes=20_000, max_buffered_bytes=1 << 20)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    federation = make_federation(tmp_path_factory.mktemp("federation"), "site-a", "site-b", "thief", "slow")
    federation.place.activate(RUN)
    return federation


@pytest.fixture(scope="module")
def host(local: LocalLLM, made: Made) -> Iterator[RunningHost]:
    own = made.place.credentials
    security = HostSecurity(own.certificate, own.key, own.root, RunTokens.of_place(made.place))
    with serve(local, security=security, limits=LIMITS, workers=2, grace=1.0) as running:
        yield running


def token(made: Made, site: str, *, run: str = RUN, lifetime: float = 600, **limits: int) -> bytes:
    return made.place.issue(run, site, time.time() + lifetime, Allowance(**limits))


@contextmanager
def remote(
    host: RunningHost, own: Credentials, shown: bytes | None, retry: float = 0.0
) -> Iterator[RemoteLLM]:
    with RemoteLLM(
        host.address,
        token=shown,
        root_certificates=own.root,
        client_key=own.key,
        client_certificate=own.certificate,
        retry_seconds=retry,
        timeout_s=20,
    ) as llm:
        yield llm


@contextmanager
def stub(host: RunningHost, made: Made, site: str, shown: bytes) -> Iterator[tuple[LanguageHostStub, Any]]:
    own = made.bundle(site).credentials
    credentials = grpc.ssl_channel_credentials(own.root, own.key, own.certificate)
    with grpc.secure_channel(host.address, credentials) as channel:
        yield LanguageHostStub(channel), (bearer(shown),)


@pytest.fixture
def neighbour(host: RunningHost, made: Made) -> Iterator[Callable[[], None]]:
    """An honest site takes steps during the whole test; call it to see that all of them went well."""
    want = take_step(LOCAL["llm"], make_batch([4, 7]))[1]
    done, failed, stop = [0], [], threading.Event()

    def work() -> None:
        with remote(host, made.bundle("site-b").credentials, token(made, "site-b")) as llm:
            while not stop.is_set():
                try:
                    assert take_step(llm, make_batch([4, 7]))[1].equal(want)
                    done[0] += 1
                except Exception as error:
                    failed.append(error)
                    return

    thread = threading.Thread(target=work)
    thread.start()

    def check() -> None:
        before = done[0]
        deadline = time.monotonic() + 20
        while done[0] < before + 2 and not failed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not failed
        assert done[0] >= before + 2

    try:
        check()
        yield check
    finally:
        stop.set()
        thread.join(30)


LOCAL: dict[str, LocalLLM] = {}


@pytest.fixture(autouse=True)
def _known_model(local: LocalLLM) -> None:
    LOCAL["llm"] = local


def test_an_enrolled_site_is_served(host: RunningHost, made: Made, local: LocalLLM) -> None:
    with remote(host, made.bundle("site-a").credentials, token(made, "site-a")) as llm:
        assert take_step(llm, make_batch([4, 7]))[1].equal(take_step(local, make_batch([4, 7]))[1])


def test_the_server_itself_is_served(host: RunningHost, made: Made) -> None:
    with remote(host, made.place.credentials, token(made, "server")) as llm:
        take_step(llm, make_batch([4]))


def test_no_certificate(host: RunningHost, made: Made, neighbour: Callable[[], None]) -> None:
    own = made.bundle("site-a").credentials
    with (
        RemoteLLM(
            host.address, token=token(made, "site-a"), root_certificates=own.root, retry_seconds=0.2
        ) as llm,
        pytest.raises(HostUnavailable),
    ):
        llm.describe()
    with (
        RemoteLLM(host.address, token=token(made, "site-a"), insecure=True, retry_seconds=0.2) as llm,
        pytest.raises(HostUnavailable),
    ):
        llm.describe()
    neighbour()


def test_a_certificate_of_a_foreign_authority(
    host: RunningHost, made: Made, tmp_path: Path, neighbour: Callable[[], None]
) -> None:
    theirs = make_federation(tmp_path / "foreign", "site-a").bundle("site-a").credentials
    mixed = Credentials(made.bundle("site-a").credentials.root, theirs.key, theirs.certificate)
    with remote(host, mixed, token(made, "site-a")) as llm, pytest.raises(HostUnavailable):
        llm.describe()
    neighbour()


def test_an_expired_certificate(
    host: RunningHost, made: Made, monkeypatch: pytest.MonkeyPatch, neighbour: Callable[[], None]
) -> None:
    class LongAgo(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(days=3)

    key = new_key()
    with monkeypatch.context() as patch:
        patch.setattr(authority, "datetime", LongAgo)
        own = Authority.load(made.folder / "authority")
        expired = own.issue_site(request_certificate(key, "site-a"), "site-a", 1)
    mixed = Credentials(made.bundle("site-a").credentials.root, private_pem(key), expired)
    with remote(host, mixed, token(made, "site-a")) as llm, pytest.raises(HostUnavailable):
        llm.describe()
    neighbour()


def test_refused_tokens(host: RunningHost, made: Made, tmp_path: Path) -> None:
    own = made.bundle("site-a").credentials
    made.place.activate("20260101-000001-ended")
    ended = token(made, "site-a", run="20260101-000001-ended")
    with remote(host, own, ended) as llm:
        llm.describe()
    made.place.deactivate("20260101-000001-ended")
    foreign = make_federation(tmp_path / "foreign", "site-a")
    for shown, said in (
        (None, "no token"),
        (b"x" * 200, "not signed by this federation's server"),
        (b"x" * 5000, "which no run token has"),
        (token(foreign, "site-a"), "not signed by this federation's server"),
        (token(made, "site-b"), "the token is for site-b, the caller is site-a"),
        (token(made, "server"), "the token is for server, the caller is site-a"),
        (token(made, "site-a", lifetime=-1), "the token expired"),
        (ended, "run 20260101-000001-ended, which is not under way"),
    ):
        with remote(host, own, shown) as llm, pytest.raises(HostRefused, match=said):
            llm.describe()


def test_a_stolen_bundle_after_revocation(
    host: RunningHost, made: Made, tmp_path: Path, neighbour: Callable[[], None]
) -> None:
    from fednano.deploy.provision import invite, revoke

    stolen, shown = made.bundle("thief").credentials, token(made, "thief")
    with remote(host, stolen, shown) as llm:
        take_step(llm, make_batch([4]))  # an open connection, a good token
        revoke(made.folder, "thief")
        with pytest.raises(HostRefused, match="thief is not enrolled"):
            take_step(llm, make_batch([4]))
        invite(made.folder, "thief")
        back = made.enroll("thief", tmp_path / "back").credentials
        with pytest.raises(HostRefused, match="thief is not enrolled"):
            take_step(llm, make_batch([4]))  # the old certificate stays out when the site comes back
    with remote(host, back, shown) as llm:
        take_step(llm, make_batch([4]))
    neighbour()


def test_what_was_recorded_is_worth_nothing_to_another_caller(host: RunningHost, made: Made) -> None:
    """A call replayed word by word, token included, but from another site's connection."""
    shown = token(made, "site-a")
    with stub(host, made, "site-b", shown) as (calls, metadata), pytest.raises(grpc.RpcError) as caught:
        calls.Describe(pb.DescribeRequest(), metadata=metadata, timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_one_sites_kept_samples_are_not_anothers(host: RunningHost, made: Made) -> None:
    header = pb.FactoredHeader(request_id="x", keys=[b"k" * 32], ranks=[1], dtype=pb.FLOAT32)
    with stub(host, made, "site-a", token(made, "site-a")) as (calls, metadata):
        with pytest.raises(grpc.RpcError) as caught:
            list(calls.FactoredStep(iter([pb.FactoredRequest(header=header)]), metadata=metadata, timeout=10))
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def step_header(tokens: int, **changes: Any) -> pb.StepRequest:
    packed = pb.Packed(dtype=pb.FLOAT32, hidden_size=D, lengths=[tokens], scale=1.0)
    return pb.StepRequest(header=pb.StepHeader(objective="cross_entropy", embeds=packed, **changes))


def outcome(call: Any) -> str:
    """Name of the status that a stream ends with."""
    return outcome_of(lambda: list(call))


def outcome_of(act: Callable[[], Any]) -> str:
    """Name of the status that a call ends with."""
    try:
        done = act()
        if not isinstance(done, bytes):
            list(done)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code.name
    return "OK"


def test_slow_callers_are_let_go_and_hold_nothing(
    host: RunningHost, made: Made, neighbour: Callable[[], None]
) -> None:
    stop = threading.Event()

    def silent() -> Iterator[pb.StepRequest]:
        stop.wait(20)
        yield from ()

    def dripping() -> Iterator[pb.StepRequest]:
        yield step_header(60)
        while not stop.wait(0.2):
            yield pb.StepRequest(chunk=b"x")

    began = time.monotonic()
    with stub(host, made, "slow", token(made, "slow", open_calls=6)) as (calls, metadata):
        open_ones = [calls.Step(frames(), metadata=metadata, timeout=15) for frames in [silent, dripping] * 3]
        neighbour()
        time.sleep(0.3)
        # A seventh, while six are open, is beyond the token's allowance.
        assert outcome(calls.Step(silent(), metadata=metadata, timeout=15)) == "RESOURCE_EXHAUSTED"
        assert {outcome(call) for call in open_ones} == {"DEADLINE_EXCEEDED"}
        assert time.monotonic() - began < 10
        stop.set()
    neighbour()


def test_announced_gigabytes_are_refused_before_they_are_received(
    host: RunningHost, made: Made, neighbour: Callable[[], None]
) -> None:
    small = {"request_bytes": 2_000, "buffered_bytes": 3_000}
    with stub(host, made, "site-a", token(made, "site-a", **small)) as (calls, metadata):
        for tokens in (30, 4_000_000_000):
            assert (
                outcome(calls.Step(iter([step_header(tokens)]), metadata=metadata, timeout=10))
                == "INVALID_ARGUMENT"
            )
        rubbish = pb.StepRequest(chunk=b"x" * (5 << 20))  # beyond what one message may have
        assert (
            outcome(calls.Step(iter([step_header(5), rubbish]), metadata=metadata, timeout=10))
            == "RESOURCE_EXHAUSTED"
        )
    assert host.stats()["buffered_bytes"] <= LIMITS.max_buffered_bytes
    neighbour()


@pytest.mark.parametrize("method", ["Step", "Keep", "FactoredStep", "Generate", "Describe"])
def test_frames_that_are_no_messages(
    host: RunningHost, made: Made, neighbour: Callable[[], None], method: str
) -> None:
    own = made.bundle("site-a").credentials
    credentials = grpc.ssl_channel_credentials(own.root, own.key, own.certificate)
    metadata = (bearer(token(made, "site-a")),)
    with grpc.secure_channel(host.address, credentials) as channel:
        kind = channel.unary_unary if method == "Describe" else channel.stream_stream
        call = kind(f"/fednano.host.v1.LanguageHost/{method}", lambda body: body, lambda body: body)
        for body in (b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"{" * 1000, b""):
            given = body if method == "Describe" else iter([body])
            answer = outcome_of(lambda given=given: call(given, metadata=metadata, timeout=10))
            empty = method == "Describe" and not body  # a good message without a field
            assert answer == "OK" if empty else answer in ("INTERNAL", "INVALID_ARGUMENT", "UNKNOWN")
    neighbour()


def test_too_many_calls_a_minute_wait_without_disturbing_others(
    host: RunningHost, made: Made, neighbour: Callable[[], None]
) -> None:
    own = made.bundle("site-a").credentials
    made.place.activate("20260101-000002-rate")
    limited = token(made, "site-a", run="20260101-000002-rate", calls_per_minute=3)
    with remote(host, own, limited) as llm:
        for _ in range(3):
            llm.stats()
        with pytest.raises(HostError, match="allows 3 calls a minute"):
            llm.stats()
    # A fresh token of the same site and run does not start anew.
    again = token(made, "site-a", run="20260101-000002-rate", calls_per_minute=3)
    with remote(host, own, again) as llm, pytest.raises(HostUnavailable, match="allows 3 calls a minute"):
        llm.stats()
    neighbour()


def test_quotas_refill_and_are_given_back() -> None:
    clock = [0.0]
    quotas, allowed = (
        Quotas(lambda: clock[0]),
        Allowance(calls_per_minute=60, open_calls=2, buffered_bytes=100),
    )
    with quotas.call("a", allowed), quotas.call("a", allowed):
        with pytest.raises(BusyError, match="2 calls at a time"), quotas.call("a", allowed):
            pass
        with quotas.call("b", allowed), quotas.hold("b", allowed, 100):
            pass
    with (
        quotas.hold("a", allowed, 60),
        pytest.raises(BusyError, match="100 bytes"),
        quotas.hold("a", allowed, 41),
    ):
        pass
    with quotas.hold("a", allowed, 100):
        pass
    with pytest.raises(HostRefused, match="request_bytes"), quotas.hold("a", allowed, 101):
        pass
    for _ in range(58):
        with quotas.call("a", allowed):
            pass
    with pytest.raises(BusyError, match="60 calls a minute"), quotas.call("a", allowed):
        pass
    clock[0] = 1.5
    with quotas.call("a", allowed):
        pass
    with pytest.raises(BusyError), quotas.call("a", allowed):
        pass
    with quotas.call("a", None), quotas.hold("a", None, 1 << 40):
        pass
