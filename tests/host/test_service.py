"""The service itself, through a bare stub: what it refuses, with which reason, and that no other call notices."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tiny_host import POSITIONS, D, V, make_batch, take_step, tiny_part

from fednano.errors import ConfigError, HostError, HostUnavailable
from fednano.host import HostLimits, RemoteLLM, RunningHost, serve
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto.language_host_pb2_grpc import LanguageHostStub
from fednano.models.language import LocalLLM

LENGTHS = [3, 5]
N = sum(LENGTHS)


@pytest.fixture(scope="module")
def channel(host: RunningHost) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(host.address) as channel:
        yield channel


def step_header(**changes: Any) -> pb.StepHeader:
    packed = pb.Packed(dtype=pb.FLOAT32, hidden_size=D, lengths=LENGTHS, scale=1.0)
    for name in ("dtype", "hidden_size", "lengths", "scale", "images"):
        if name in changes:
            value = changes.pop(name)
            if name in ("lengths", "images"):
                packed.ClearField(name)
                getattr(packed, name).extend(value)
            else:
                setattr(packed, name, value)
    return pb.StepHeader(**{"objective": "cross_entropy", "embeds": packed, "want_gradient": True, **changes})


def step_body(numbers: list[float] | None = None, labels: list[int] | None = None) -> bytes:
    return struct.pack(f"<{N * D}f", *(numbers or [0.1] * (N * D))) + struct.pack(
        f"<{N}i", *(labels or [1] * N)
    )


def step(channel: grpc.Channel, *frames: pb.StepRequest, timeout: float = 20) -> list[pb.StepReply]:
    return list(LanguageHostStub(channel).Step(iter(frames), timeout=timeout))


def good(channel: grpc.Channel) -> None:
    replies = step(channel, pb.StepRequest(header=step_header()), pb.StepRequest(chunk=step_body()))
    assert len(replies[0].header.losses) == 2
    assert len(replies[1].chunk) == N * D * 4


def refused(call: Callable[[], object]) -> tuple[str, str, str]:
    """Status, reason and text with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return error.code().name, dict(error.trailing_metadata()).get("fednano-reason", ""), error.details()


NAN = [0.1] * (N * D)
NAN[4 * D + 1] = float("nan")
STEPS: dict[str, tuple[list[Any], str]] = {
    "hidden size": ([step_header(hidden_size=D + 1)], f"hidden_size: got {D + 1}, expected {D}"),
    "no dtype": ([step_header(dtype=0)], "dtype: got wire code 0"),
    "unknown dtype": ([step_header(dtype=9)], "dtype: got wire code 9"),
    "no scale": ([step_header(scale=0)], "scale: got 0.0, expected a positive finite number"),
    "NaN scale": ([step_header(scale=float("nan"))], "scale: got nan"),
    "no sample": ([step_header(lengths=[])], "lengths: got no sample"),
    "empty sample": ([step_header(lengths=[3, 0])], "lengths: sample 1 has no token"),
    "too long": (
        [step_header(lengths=[3, POSITIONS + 1])],
        f"sample 1 has {POSITIONS + 1} tokens; the model has",
    ),
    "too many samples": ([step_header(lengths=[1] * 257)], "request beyond max_batch: got 257"),
    "too many tokens": ([step_header(lengths=[200] * 250)], "request beyond max_tokens: got 50000"),
    "ten gigabytes": ([step_header(lengths=[4_000_000_000])], "request beyond max_tokens: got 4000000000"),
    "unknown objective": ([step_header(objective="hinge"), step_body()], "unknown objective 'hinge'"),
    "no header": ([step_body()], "step: got no header, expected it as the first message"),
    "nothing": ([], "step: got no header"),
    "empty message": ([pb.StepRequest()], "step: got no header"),
    "second header": ([step_header(), step_header()], "step: got a second header, expected chunks"),
    "too short": (
        [step_header(), step_body()[:-1]],
        f"got {N * (D + 1) * 4 - 1} bytes, expected {N * (D + 1) * 4}",
    ),
    "no body": ([step_header()], "step: got 0 bytes"),
    "too long a body": ([step_header(), step_body() + b"x"], "got a chunk of"),
    "empty chunk": ([step_header(), b""], "got a chunk of 0 bytes"),
    "NaN": ([step_header(), step_body(numbers=NAN)], "embeds: sample 1 holds NaN or infinity"),
    "label too big": ([step_header(), step_body(labels=[1] * 7 + [V])], f"labels: sample 1 has label {V}"),
    "label negative": ([step_header(), step_body(labels=[1, -7, *[1] * 6])], "labels: sample 0 has label -7"),
    "image beyond its sample": (
        [step_header(images=[pb.ImageSpan(sample=0, start=2, height=2, width=2)])],
        "images: sample 0 of 3 tokens has an image of 2 x 2 tokens at 2",
    ),
    "image without tokens": (
        [step_header(images=[pb.ImageSpan(sample=1, start=0, height=0, width=2)])],
        "images: sample 1 of 5 tokens has an image of 0 x 2 tokens",
    ),
    "huge image": (
        [step_header(images=[pb.ImageSpan(sample=1, start=1, height=2**32 - 1, width=2**32 - 1)])],
        "expected images in order, side by side, inside the sample",
    ),
    "image of no sample": (
        [step_header(images=[pb.ImageSpan(sample=2, start=0, height=1, width=1)])],
        "images: got those of sample 2, expected 0 to 1 in order",
    ),
    "no label": ([step_header(), step_body(labels=[-100] * 3 + [1] * 5)], "labels: sample 0 has no label"),
}


def frame(item: Any) -> pb.StepRequest:
    if isinstance(item, bytes):
        return pb.StepRequest(chunk=item)
    return pb.StepRequest(header=item) if isinstance(item, pb.StepHeader) else item


@pytest.mark.parametrize("what", list(STEPS))
def test_bad_steps_are_refused_and_the_next_one_works(
    host: RunningHost, channel: grpc.Channel, what: str
) -> None:
    items, message = STEPS[what]
    before = host.stats().get("refused_invalid", 0)
    status, reason, text = refused(lambda: step(channel, *map(frame, items)))
    assert (status, reason) == ("INVALID_ARGUMENT", "invalid")
    assert message in text
    assert host.stats()["refused_invalid"] == before + 1
    good(channel)
    assert host.stats()["in_flight"] == host.stats()["buffered_bytes"] == 0


def test_another_model_is_refused(channel: grpc.Channel) -> None:
    header = step_header(fingerprint="somebody else's")
    status, reason, text = refused(lambda: step(channel, frame(header)))
    assert (status, reason) == ("FAILED_PRECONDITION", "model")
    assert "this host serves model tiny-0, the client expects somebody els" in text
    good(channel)


@pytest.mark.parametrize(
    ("changes", "chunks", "message"),
    [
        ({"max_new_tokens": 0}, 0, "max_new_tokens: got 0"),
        ({"max_new_tokens": 5000}, 0, "request beyond max_new_tokens: got 5000"),
        ({"max_new_tokens": 60}, 0, "sample 1 has 5 tokens and asks for 60 new ones"),
        ({"max_new_tokens": 4, "client_embeds": True}, 2, "generate: got a chunk of 193 bytes"),
    ],
)
def test_bad_generation_is_refused(
    channel: grpc.Channel, changes: dict[str, Any], chunks: int, message: str
) -> None:
    packed = pb.Packed(dtype=pb.FLOAT32, hidden_size=D, lengths=LENGTHS, scale=1.0)
    prompt = struct.pack(f"<{N * D}f", *[0.1] * (N * D))
    frames = [
        pb.GenerateRequest(header=pb.GenerateHeader(embeds=packed, **changes)),
        pb.GenerateRequest(chunk=prompt),
    ]
    if chunks == 2:
        frames.append(pb.GenerateRequest(chunk=b"x" * (2 * D * 4 + 1)))
    status, reason, text = refused(lambda: list(LanguageHostStub(channel).Generate(iter(frames), timeout=20)))
    assert (status, reason) == ("INVALID_ARGUMENT", "invalid")
    assert message in text
    good(channel)


def test_health_is_served(channel: grpc.Channel) -> None:
    reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


class Gate:
    """A model whose computations wait until they are let through."""

    def __init__(self) -> None:
        self.part = tiny_part()
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.part.decoder.register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.entered.release()
        assert self.open.wait(30)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_full_host_says_busy_and_serves_again() -> None:
    gate = Gate()
    with serve(LocalLLM(gate.part), limits=HostLimits(max_requests=1)) as host:
        remote = RemoteLLM(host.address, insecure=True, retry_seconds=20)
        hasty = RemoteLLM(host.address, insecure=True, retry_seconds=0)
        first, errors = in_thread(lambda: take_step(remote, make_batch([4])))
        assert gate.entered.acquire(timeout=10)
        with pytest.raises(HostUnavailable, match=r"stayed busy: tried 1 times .* 1 requests are in flight"):
            take_step(hasty, make_batch([4]))
        second, more = in_thread(lambda: take_step(remote, make_batch([5])))
        wait_for(lambda: host.stats().get("refused_busy", 0) >= 2)
        gate.open.set()
        first.join()
        second.join()
        assert not errors
        assert not more
        take_step(hasty, make_batch([4]))
        assert host.stats()["in_flight"] == 0
        remote.close()
        hasty.close()


def test_buffered_bytes_are_bounded_but_a_lone_request_is_always_taken() -> None:
    gate = Gate()
    with serve(LocalLLM(gate.part), limits=HostLimits(max_buffered_bytes=10)) as host:
        remote = RemoteLLM(host.address, insecure=True, retry_seconds=0)
        first, errors = in_thread(lambda: take_step(remote, make_batch([4])))
        assert gate.entered.acquire(timeout=10)
        assert host.stats()["buffered_bytes"] == 4 * (D * 4 + 4)
        with pytest.raises(HostUnavailable, match="requests in flight hold 400 bytes"):
            take_step(remote, make_batch([4]))
        gate.open.set()
        first.join()
        assert not errors
        remote.close()


def test_a_waiting_request_whose_deadline_passes_is_never_computed() -> None:
    gate = Gate()
    with serve(LocalLLM(gate.part)) as host:
        patient = RemoteLLM(host.address, insecure=True, retry_seconds=0)
        hasty = RemoteLLM(host.address, insecure=True, retry_seconds=0, timeout_s=0.5)
        hasty.describe()
        first, errors = in_thread(lambda: take_step(patient, make_batch([4])))
        assert gate.entered.acquire(timeout=10)
        with pytest.raises(HostUnavailable, match=r"did not answer within 0.5 s"):
            take_step(hasty, make_batch([4]))
        wait_for(lambda: host.stats().get("cancelled", 0) == 1)
        assert host.stats()["in_flight"] == 1
        gate.open.set()
        first.join()
        assert not errors
        assert host.stats()["computed"] == 1
        take_step(patient, make_batch([4]))
        assert host.stats()["computed"] == 2
        assert host.stats()["in_flight"] == 0
        patient.close()
        hasty.close()


def test_a_client_that_stops_sending_is_dropped(local: LocalLLM) -> None:
    with (
        serve(local, limits=HostLimits(idle_seconds=0.3)) as host,
        grpc.insecure_channel(host.address) as channel,
    ):
        hold = threading.Event()

        def frames() -> Iterator[pb.StepRequest]:
            yield frame(step_header())
            hold.wait(20)

        status, reason, text = refused(lambda: list(LanguageHostStub(channel).Step(frames(), timeout=20)))
        hold.set()
        assert (status, reason) == ("DEADLINE_EXCEEDED", "idle")
        assert "the client neither sent nor took anything for 0.3 s" in text
        assert host.stats()["in_flight"] == 0
        good(channel)


def test_a_client_that_leaves_frees_its_place(local: LocalLLM) -> None:
    with serve(local) as host, grpc.insecure_channel(host.address) as channel:
        hold = threading.Event()

        def frames() -> Iterator[pb.StepRequest]:
            yield frame(step_header())
            hold.wait(20)

        call = LanguageHostStub(channel).Step(frames(), timeout=20)
        wait_for(lambda: host.stats()["in_flight"] == 1)
        call.cancel()
        hold.set()
        wait_for(lambda: host.stats()["in_flight"] == 0)
        assert host.stats()["cancelled"] == 1
        good(channel)


def test_a_fault_of_the_host_ends_one_call_only(caplog: pytest.LogCaptureFixture) -> None:
    part = tiny_part()
    full = torch.OutOfMemoryError("CUDA out of memory")  # as it is, and with checkpoints
    faults = iter([RuntimeError("secret detail"), full, full])

    def maybe_fail(*_: object) -> None:
        fault = next(faults, None)
        if fault is not None:
            raise fault

    part.decoder.register_forward_pre_hook(maybe_fail)
    with serve(LocalLLM(part)) as host, RemoteLLM(host.address, insecure=True, retry_seconds=5) as remote:
        with pytest.raises(HostError, match="failed at this call: the host failed; see its log") as caught:
            take_step(remote, make_batch([4]))
        assert "secret" not in str(caught.value)
        assert "secret detail" in caplog.text
        take_step(remote, make_batch([4]))  # out of memory first, then fine
        stats = host.stats()
        assert (stats["refused_internal"], stats["refused_busy"], stats["step_done"]) == (1, 1, 1)


def test_stopping_lets_calls_under_way_end() -> None:
    gate = Gate()
    with serve(LocalLLM(gate.part), grace=20) as host:
        remote = RemoteLLM(host.address, insecure=True, retry_seconds=0)
        first, errors = in_thread(lambda: take_step(remote, make_batch([4])))
        assert gate.entered.acquire(timeout=10)
        threading.Timer(0.3, gate.open.set).start()
    first.join()
    assert not errors
    remote.close()


def test_bad_settings_of_a_host(local: LocalLLM) -> None:
    for options, message in (
        ({"listen": "127.0.0.1"}, "listen: got '127.0.0.1', expected HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, "expected HOST:PORT"),
        ({"workers": 0}, "workers: got 0, expected at least 1"),
        ({"threads": 0}, "threads: got 0"),
    ):
        with pytest.raises(ConfigError, match=message), serve(local, **options):  # type: ignore[arg-type]
            pass
    with pytest.raises(ConfigError, match="max_batch: got 0, expected a number above 0"):
        HostLimits(max_batch=0)


def test_a_taken_port_is_told(local: LocalLLM, host: RunningHost) -> None:
    with (
        pytest.raises(ConfigError, match=rf"cannot listen at {host.address}: the port is taken"),
        serve(local, listen=host.address),
    ):
        pass


def test_no_thread_outlives_its_host_and_client(local: LocalLLM) -> None:
    with serve(local):
        pass  # gRPC starts a thread of its own with the first server, and keeps it
    before = set(threading.enumerate())
    with serve(local, workers=3) as host, RemoteLLM(host.address, insecure=True) as remote:
        take_step(remote, make_batch([4, 5]))
        embeds, mask, _ = make_batch([4, 5])
        remote.generate(embeds, mask, 2, embed=lambda ids: torch.zeros(len(ids), D))
        assert {thread.name for thread in set(threading.enumerate()) - before} > {"language-host-loop"}
    wait_for(lambda: not set(threading.enumerate()) - before)
