"""Serving the dashboard until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path

from fednano.errors import ConfigError

__all__ = ["dashboard"]

_LOCAL_NAMES = ["localhost", "127.0.0.1", "["]  # the last is what starlette takes of "[::1]:8642"


def dashboard(
    runs_dir: str | Path = "runs",
    *,
    port: int = 8642,
    bind: str = "127.0.0.1",
    host_metrics: str = "",
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the web page of a folder of runs, until the process is asked to end.

    Args:
        runs_dir: the folder that holds all runs; it may be made later.
        port: TCP port; 0 takes a free one.
        bind: address to listen at. Whoever reaches it can read every run: there is no login.
        host_metrics: URL of a language host's Prometheus endpoint, to show its load.
        ready: called with the page's URL once it can be opened.

    Raises:
        ConfigError: the port is taken or out of range, the address is not one of this machine, or the URL is none.
    """
    import uvicorn

    from fednano.board.app import make_app
    from fednano.board.load import HostLoad
    from fednano.board.observer import Observer

    root = Path(runs_dir)
    if root.exists() and not root.is_dir():
        raise ConfigError(
            f"runs-dir is {str(runs_dir)!r}, which is not a folder. Give the folder of the runs."
        )
    load = HostLoad(host_metrics) if host_metrics else None
    listener = _listen(bind, port)
    address = listener.getsockname()
    local = ipaddress.ip_address(address[0]).is_loopback
    app = make_app(Observer(root), load, hosts=_LOCAL_NAMES if local else None)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
    )
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    with listener:
        if ready is not None:
            ready(f"http://{name}:{address[1]}/")
        server.run(sockets=[listener])


def _listen(bind: str, port: int) -> socket.socket:
    if not 0 <= port < 65_536:
        raise ConfigError(f"port is {port}; expected 0 (any free one) to 65535.")
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(bind).version == 6 else socket.AF_INET
    except ValueError as error:
        raise ConfigError(
            f"bind is {bind!r}; expected an address such as 127.0.0.1 (this machine) or 0.0.0.0 (every network)."
        ) from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bind, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the dashboard cannot listen at {bind}:{port}: {(error.strerror or str(error)).lower()}. Choose another "
            "port with --port, 0 for any free one."
        ) from error
    return listener
