"""Real Flower processes on loopback, each with its own home, ports and folders; all gone afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes_of(marker: str) -> list[int]:
    """Process ids whose environment holds ``marker``; Flower leaves some behind that are nobody's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Sandbox:
    """A folder, an environment, and every process started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = f"FEDNANO_TEST={folder}"
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flwr"),
            "FEDNANO_TEST": str(folder),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        self.environment.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # some fifty processes would each compile the library
        (folder / "flwr").mkdir()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, name: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(
        self, *command: str, timeout: float = 900, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}\n{self.logs()}"
            )
        return done

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(self.folder.glob("*.log"))
        )

    def leftovers(self) -> list[int]:
        return processes_of(self.marker)

    def close(self) -> None:
        for wait in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.leftovers():
                try:
                    os.kill(pid, wait)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline:
                for process in self._started:
                    process.poll()
                if not self.leftovers():
                    for process in self._started:
                        process.wait(10)
                    return
                time.sleep(0.1)
        raise AssertionError(f"these processes did not end: {self.leftovers()}")
