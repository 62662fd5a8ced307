"""Hosts as child processes: start, stop, being killed, coming back, and losing their parent."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_host import load, make_batch, take_step, toy_part

from fednano.errors import HostError, HostRefused, HostUnavailable
from fednano.host import HostProcess, RemoteLLM, RunningHost, host_command, new_token
from fednano.host.cli import main
from fednano.models.language import LocalLLM

SCRIPT = str(Path(__file__).parent / "tiny_host.py")


def command(address: str = "127.0.0.1:0") -> list[str]:
    return [sys.executable, SCRIPT, "--model", "toy-0.5", "--listen", address, "--threads", "1"]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Call(threading.Thread):
    """One step in a thread; ``result`` is what it returned or raised."""

    def __init__(self, remote: RemoteLLM, watch: RemoteLLM | None = None) -> None:
        super().__init__()
        self.remote, self.result = remote, None
        self.before = watch.stats()["in_flight"] if watch else 0
        self.start()
        if watch:
            wait_for(lambda: watch.stats()["in_flight"] > self.before)

    def run(self) -> None:
        try:
            self.result = take_step(self.remote, make_batch([4, 6]))  # type: ignore[assignment]
        except BaseException as error:
            self.result = error  # type: ignore[assignment]


def test_life_of_a_host_process(tmp_path: Path) -> None:
    """One story, since each start costs seconds: serve, drain, come back, die in mid-step, come back, die for good."""
    token, log = new_token(), tmp_path / "host.log"
    want = take_step(LocalLLM(toy_part()), make_batch([4, 6]))

    def matches(call: Call) -> bool:
        call.join()
        return isinstance(call.result, tuple) and all(map(torch.equal, call.result, want))

    with socket.socket() as leak:
        leak.set_inheritable(True)
        first = HostProcess(command(), tokens=[token], log=log)
        handle = str(Path(f"/proc/self/fd/{leak.fileno()}").readlink()) if sys.platform == "linux" else ""
    remote = RemoteLLM(first.address, insecure=True, token=token, retry_seconds=90)
    watch = RemoteLLM(first.address, insecure=True, token=token, retry_seconds=90)
    try:
        assert first.fingerprint == "toy-0"
        if handle:
            assert handle not in {str(f.readlink()) for f in Path(f"/proc/{first.pid}/fd").iterdir()}
            assert token not in Path(f"/proc/{first.pid}/cmdline").read_bytes()
        with (
            RemoteLLM(first.address, insecure=True, token=new_token()) as stranger,
            pytest.raises(HostRefused, match="refused the token"),
        ):
            stranger.describe()

        call = Call(remote, watch)
        os.kill(first.pid, signal.SIGTERM)
        assert matches(call)  # drained
        assert first.stop() == 0
        assert not first.running

        call = Call(remote)  # nobody is there
        time.sleep(0.2)
        second = HostProcess(command(first.address), tokens=[token], log=log)
        assert matches(call)
        assert remote.wire.step.calls > remote.wire.step.samples / 2

        call = Call(remote, watch)
        second.kill()
        assert call.is_alive()
        third = HostProcess(command(first.address), tokens=[token], log=log)
        assert matches(call)

        hasty = RemoteLLM(first.address, insecure=True, token=token, retry_seconds=0.5)
        hasty.describe()
        call = Call(hasty, watch)
        third.kill()
        call.join()
        assert isinstance(call.result, HostUnavailable)
        message = rf"no language host answers at {first.address}: tried \d+ times over .* Check that it runs"
        with pytest.raises(HostUnavailable, match=message):
            raise call.result
        hasty.close()
        assert "without TLS: for this machine only" in log.read_text()
    finally:
        remote.close()
        watch.close()
        for name in ("first", "second", "third"):
            if name in locals() and locals()[name].running:
                locals()[name].kill()


def test_the_end_of_the_parent_ends_the_child() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, signal, sys\n"
            "from fednano.host.process import HostProcess\n"
            "host = HostProcess(sys.argv[1:])\n"
            "print(host.pid, host.address, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n",
            *command(),
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid, address = parent.stdout.readline().split()
    assert parent.wait(30) == -signal.SIGKILL
    parent.stdout.close()

    def gone() -> bool:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{int(pid)}/status")  # an orphan that nobody reaps counts as gone
        return status.exists() and "State:\tZ" in status.read_text()

    wait_for(gone)
    with (
        RemoteLLM(address.decode(), insecure=True, retry_seconds=0) as remote,
        pytest.raises(HostUnavailable),
    ):
        remote.describe()


def test_a_child_that_fails_to_start_is_told_with_its_reason() -> None:
    for code, message in (
        (
            "import sys; sys.exit('no weights there')",
            "ended with status 1 before it served: no weights there",
        ),
        ("pass", r"ended with status 0 before it served: \(nothing was written\)"),
    ):
        with pytest.raises(HostError, match=message):
            HostProcess([sys.executable, "-c", code])
    slow = "import sys, time; print('loading', file=sys.stderr, flush=True); time.sleep(60)"
    with pytest.raises(
        HostError, match=r"did not serve within 1.5 s and was ended; its log ends with: loading"
    ):
        HostProcess([sys.executable, "-c", slow], start_seconds=1.5)


def test_the_command_of_a_host() -> None:
    assert host_command("tiny", "--workers", "2")[1:] == [
        *("-P", "-m", "fednano.host", "--model", "tiny", "--listen", "127.0.0.1:0", "--workers", "2")
    ]


def test_mistakes_on_the_command_line_end_with_a_message(
    host: RunningHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, bad, good = tmp_path / "empty", tmp_path / "bad", tmp_path / "good"
    empty.write_text("\n")
    bad.write_text("not base64!\n")
    good.write_text(base64.urlsafe_b64encode(new_token()).decode() + "\n")
    for options, message in (
        (["--listen", "0.0.0.0:0"], "refusing to listen at 0.0.0.0:0 without TLS"),
        (["--listen", host.address], f"cannot listen at {host.address}: the port is taken"),
        (["--listen", host.address, "--token-file", str(good)], "the port is taken"),
        (["--max-batch", "0"], "max_batch: got 0"),
        (["--workers", "0"], "workers: got 0"),
        (["--token-file", str(empty)], "no token in it"),
        (["--token-file", str(bad)], "expected one base64url text a line"),
        (["--token-file", str(tmp_path / "none")], "No such file"),
        (["--tls-cert", str(good)], "a certificate without its key"),
        (["--keep-gpu-bytes", "1000"], "the model lies on no GPU"),
        (["--keep-bytes", "-1"], "kept bytes: got -1"),
    ):
        assert main(["--model", "toy", *options], load=load) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--listen", "127.0.0.1:0"])
    assert "--model" in capsys.readouterr().err
