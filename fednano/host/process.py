"""A host as a child process: started by a simulation, ended with it, however it ends."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from fednano.errors import HostError

__all__ = ["HostProcess", "host_command"]


def host_command(model: str, *options: str) -> list[str]:
    """Command line of a host for `HostProcess`.

    Args:
        model: ``"tiny"``, a folder, or a Hugging Face id.
        options: further arguments of ``python -m fednano.host``, such as ``"--workers", "2"``.
    """
    # -P keeps the working folder off the path: a folder there may bear the name of a package that a library looks for.
    return [sys.executable, "-P", "-m", "fednano.host", "--model", model, "--listen", "127.0.0.1:0", *options]


class HostProcess:
    """Starts a host and waits until it serves. A context manager.

    Tokens go through the child's stdin, so that they show neither in the list of processes nor in a file. The same
    pipe is its lifeline: when this process ends, in whatever way, the pipe closes and the host stops. The child has a
    session of its own, so that Ctrl-C in a terminal reaches only this process, which then stops it in order. It
    inherits the environment, and of open files only stdin, stdout and stderr.

    Args:
        command: command line that ends in `fednano.host.cli.main`; see `host_command`. ``--managed`` is added.
        tokens: raw tokens that the host admits; none admits everybody on this machine.
        start_seconds: how long to wait until it serves.
        log: file for what it writes to stderr (appended); ``None`` keeps it for error messages only.

    Raises:
        HostError: it ended, or did not serve in time; the message holds the end of its stderr.

    Attributes:
        address: ``HOST:PORT`` it is bound to.
        fingerprint: of its model.
        pid: of the child.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        tokens: Sequence[bytes] = (),
        start_seconds: float = 300.0,
        log: Path | None = None,
    ) -> None:
        self._log: IO[bytes] = log.open("ab") if log else tempfile.TemporaryFile()  # noqa: SIM115
        self._log_start = self._log.seek(0, 2)
        self._log_path = log
        self._process = subprocess.Popen(
            [*command, "--managed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            settings = {"tokens": [base64.urlsafe_b64encode(token).decode() for token in tokens]}
            self._tell(json.dumps(settings).encode() + b"\n")
            ready = self._ready(start_seconds)
        except BaseException:
            self.kill()
            raise
        self.address: str = ready["address"]
        self.fingerprint: str = ready["fingerprint"]
        self.pid = self._process.pid

    def __enter__(self) -> HostProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the child is alive."""
        return self._process.poll() is None

    def stop(self, seconds: float = 20.0) -> int:
        """Drain and end the host; kill it if that takes longer than ``seconds``.

        Returns:
            Its exit status: 0 for a clean end.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._reap()

    def kill(self) -> int:
        """End the host at once, in the middle of whatever it does.

        Returns:
            Its exit status.
        """
        self._process.kill()
        return self._reap()

    def _reap(self) -> int:
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        return status

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already; _ready tells why
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _ready(self, seconds: float) -> dict[str, str]:
        """The line that the child prints when it serves. A thread reads it: a pipe cannot be waited for everywhere."""
        assert self._process.stdout is not None
        stdout, lines = self._process.stdout, queue.SimpleQueue[bytes]()
        reader = threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True)
        reader.start()
        try:
            line = lines.get(timeout=seconds)
        except queue.Empty:
            self._process.kill()
            reader.join()
            raise HostError(
                f"the language host did not serve within {seconds:g} s and was ended; its log ends with: {self._tail()}"
            ) from None
        reader.join()
        if not line:
            status = self._process.wait()
            raise HostError(f"the language host ended with status {status} before it served: {self._tail()}")
        ready: dict[str, str] = json.loads(line)
        return ready

    def _tail(self) -> str:
        """The last lines of the child's stderr."""
        if self._log_path is not None:
            with self._log_path.open("rb") as file:
                file.seek(self._log_start)
                data = file.read()
        else:
            self._log.seek(0)
            data = self._log.read()
        lines = data.decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-10:]) or "(nothing was written)"
