"""What `server up` and `client up` have in common: a folder of state, children, one loop, one clean end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fednano.deploy.supervise import Child, alive, end_all
from fednano.errors import ConfigError
from fednano.runs.atomic import read_json, write_json

__all__ = [
    "flower",
    "flower_environment",
    "free_port",
    "keep_up",
    "owned",
    "read_status",
    "require_up",
    "run_app",
    "say",
]

_TICK_S = 0.5
_PATIENCE_S = 120.0  # for `flwr run`
_STARTING_S = 30.0


def say(text: str) -> None:
    """Tell the operator, on standard error, where systemd and Docker collect it."""
    print(text, file=sys.stderr, flush=True)


def free_port() -> int:
    """A port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def flower(name: str) -> str:
    """Path of one of Flower's commands, beside this interpreter."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Install flwr into the environment that fednano runs in.")
    return str(path)


def flower_environment(home: Path) -> dict[str, str]:
    """What Flower's processes find in their environment."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def run_app(state: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Hand the server's app to its SuperLink.

    Args:
        state: the server's folder of state, with the app and Flower's configuration.
        settings: of the app.
        environment: of Flower's commands.

    Returns:
        Why Flower did not take it; empty when it did.
    """
    config = state / "run-config.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    try:
        done = subprocess.run(
            [flower("flwr"), "run", str(state / "app"), "server", "--run-config", str(config)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"`flwr run` did not end within {_PATIENCE_S:g} s"
    said = (done.stderr or done.stdout).strip().splitlines()
    return (
        (" ".join(said[-3:])[:500] or f"`flwr run` ended with {done.returncode}") if done.returncode else ""
    )


@contextlib.contextmanager
def owned(state: Path) -> Iterator[None]:
    """Hold a state folder alone; what an earlier holder left behind when it was killed is ended first.

    Raises:
        ConfigError: another process holds it.
    """
    state.mkdir(parents=True, exist_ok=True)
    handle = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"it is running already: another process holds {state / 'lock'}.") from error
        before = state / "marks.json"
        if before.exists():
            end_all(read_json(before))
        yield
    finally:
        os.close(handle)


def keep_up(
    state: Path,
    children: list[Child],
    work: Callable[[list[Child]], dict[str, Any]],
) -> None:
    """Keep children running until SIGTERM or SIGINT, then end them, last started first.

    Args:
        state: folder for ``status.json``.
        children: what shall run; in this order they are started.
        work: called about twice a second; what it returns is the status to be shown.
    """
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    write_json(state / "marks.json", [child.mark for child in children])
    try:
        while not ended.is_set():
            for child in children:
                if told := child.tend():
                    say(told)
            status = work(children)
            shown = [{"name": c.name, "pid": c.pid, "restarts": max(0, c.restarts)} for c in children]
            write_json(state / "status.json", {"pid": os.getpid(), "processes": shown, **status})
            ended.wait(_TICK_S)
        say("ending ...")
    finally:
        # A second signal must not end this process before its children.
        for child in reversed(children):
            child.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
        for name in ("status.json", "marks.json"):
            (state / name).unlink(missing_ok=True)


def require_up(root: Path) -> Iterator[None]:
    """Yields each time that somebody still has reason to wait for a server.

    Args:
        root: folder of the server.

    Raises:
        ConfigError: none has been up for half a minute.
    """
    seen = time.monotonic()
    while True:
        if read_status(root / "state") is not None:
            seen = time.monotonic()
        elif time.monotonic() - seen > _STARTING_S:
            raise ConfigError(
                f"the order is kept, but no server is up in {root}. Start it: fednano server up --server {root}"
            )
        yield


def read_status(state: Path) -> dict[str, Any] | None:
    """What a running server or client says of itself; ``None`` when none runs there."""
    path = state / "status.json"
    if not path.exists():
        return None
    status: dict[str, Any] = read_json(path)
    return status if alive(int(status["pid"])) else None
