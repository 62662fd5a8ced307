"""Child processes that are kept alive, and ended with everything that they started.

Flower's processes start others that outlive them. Each child therefore gets a session of its own and a mark in its
environment: what bears the mark is the child's, and is ended when the child has ended, however that came about.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["Child", "alive", "bearers", "command", "end_all"]

_MARK = "FEDNANO_CHILD"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0
_STEADY_S = 60.0  # a child that ran so long has recovered


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a module of this installation.

    ``-P`` keeps the working folder off the path: a folder there may bear a name that a library looks for.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


class Child:
    """One process that shall run.

    Args:
        name: for messages, and of the log file.
        arguments: its command line.
        log: file that its output is appended to.
        environment: variables on top of this process's.
        now: a clock in seconds.
        ailing: a text after which the process is of no more use, though it runs: it is ended and started again.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        now: Callable[[], float] = time.monotonic,
        ailing: str = "",
    ) -> None:
        self.name, self.restarts = name, -1
        self._arguments, self._log, self._now = list(arguments), log, now
        self.mark = secrets.token_hex(8)
        self._environment = {**os.environ, **(environment or {}), _MARK: self.mark}
        self._process: subprocess.Popen[bytes] | None = None
        self._began, self._next, self._pause = 0.0, 0.0, _FIRST_PAUSE_S
        self._ailing, self._heard = ailing.encode(), 0

    @property
    def pid(self) -> int:
        """Its process id; 0 when it is not running."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def tend(self) -> str:
        """Start the process if it is not running and its pause is over, or if what it says is that it must be.

        Returns:
            What happened, in words; empty when nothing did.
        """
        if self.pid:
            if not self._is_ailing():
                return ""
            self.stop()
            return f"{self.name} said what it does not recover from, and is started again (log: {self._log})"
        moment, said = self._now(), ""
        if self._process is not None:
            status = self._process.returncode
            if moment - self._began > _STEADY_S:
                self._pause = _FIRST_PAUSE_S
            self._next = moment + self._pause
            said = f"{self.name} ended with status {status}; it starts again in {self._pause:g} s (log: {self._log})"
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
            self._process = None
            end_all([self.mark])
        if moment < self._next:
            return said
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._heard = log.tell()
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        self._began = moment
        self.restarts += 1
        return said or f"{self.name} started, process {self._process.pid}"

    def _is_ailing(self) -> bool:
        """Whether the text is in what it has said since the last look. Lines that are not whole yet are left."""
        if not self._ailing:
            return False
        try:
            with self._log.open("rb") as log:
                log.seek(self._heard)
                news = log.read()
        except OSError:
            return False
        whole = news[: news.rfind(b"\n") + 1]
        self._heard += len(whole)
        return self._ailing in whole

    def stop(self, seconds: float = 15.0) -> None:
        """End the process and what it started: asked first, killed after ``seconds``."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        end_all([self.mark])


def end_all(marks: Sequence[str], seconds: float = 5.0) -> None:
    """End every process that bears one of these marks: asked first, killed after ``seconds``."""
    deadline, number = time.monotonic() + seconds, signal.SIGTERM
    while left := [pid for mark in marks for pid in bearers(mark)]:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs. One that has ended and waits for its parent to notice does not."""
    try:
        os.kill(pid, 0)
        return not _dead(Path("/proc") / str(pid))
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # as another user
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()  # gone meanwhile, or a system that does not tell


def bearers(mark: str) -> list[int]:
    """Processes with the mark in their environment. Empty on systems that do not tell (other than Linux)."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0") and not _dead(entry):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _dead(entry: Path) -> bool:
    """Whether a process has ended and waits for its parent to notice."""
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
