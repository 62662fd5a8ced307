"""`fednano server up`: SuperLink, gateway and language host of a federation, kept running; its sites, runs and jobs."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fednano.deploy.gateway import Gateway
from fednano.deploy.node import flower, flower_environment, free_port, keep_up, owned, say
from fednano.deploy.orders import Orders
from fednano.deploy.plan import Plan
from fednano.deploy.supervise import Child, command
from fednano.errors import FednanoError, RunError
from fednano.federation.superlink import SuperLink, write_app
from fednano.security.authority import require_valid
from fednano.security.place import ServerPlace

__all__ = ["server_up"]

_SUPERLINK, _HOST = "superlink", "host"
_NODES_EVERY_S = 3.0
_CONNECTION = """\
[superlink]
default = "server"

[superlink.server]
address = "127.0.0.1:{port}"
root-certificates = "{root}"
"""


def server_up(root: Path) -> None:
    """Run a federation's server until SIGTERM or SIGINT.

    Args:
        root: folder of the server.

    Raises:
        ConfigError: the folder is none, a key can be read by others, the certificate is not valid now, a port is
            taken, or it runs already.
    """
    place = ServerPlace(root.absolute())
    plan, state = Plan.from_json(place.plan), place.root / "state"
    # What is wrong with the keys is said now, if anything is.
    require_valid(place.credentials.certificate, "fednano deploy renew")
    with owned(state):
        inside, metrics = free_port(), free_port()
        flwr = flower_environment(state / "flwr")
        (state / "flwr" / "config.toml").write_text(
            _CONNECTION.format(port=inside, root=place.root / "ca.crt")
        )
        write_app(state / "app")
        children = [
            Child(_SUPERLINK, _superlink(place, inside), state / "superlink.log", flwr),
            Child(_HOST, _host(place, plan, metrics), state / "host.log"),
        ]
        desk = _Desk(place, flwr, f"127.0.0.1:{inside}", metrics)
        with _gateway(place, plan, inside):
            say(f"{plan.name}: SuperNodes at {plan.fleet}, language host at {plan.language_host}")
            place.audit.record("server up")
            try:
                keep_up(state, children, desk.work)
            finally:
                place.audit.record("server down")


def _superlink(place: ServerPlace, port: int) -> list[str]:
    return [
        flower("flower-superlink"),
        *("--ssl-certfile", str(place.root / "server.crt"), "--ssl-keyfile", str(place.root / "server.key")),
        *("--ssl-ca-certfile", str(place.root / "ca.crt")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--database", str(place.root / "state" / "superlink.db")),
    ]


def _host(place: ServerPlace, plan: Plan, metrics: int) -> list[str]:
    return command(
        "fednano.host",
        *("--model", plan.host.model, *plan.host.options()),
        *("--listen", f"{plan.listen}:{plan.host_port}", "--server", str(place.root)),
        *("--metrics", f"127.0.0.1:{metrics}", "--log-level", "INFO"),
    )


@contextmanager
def _gateway(place: ServerPlace, plan: Plan, upstream: int) -> Iterator[Gateway]:
    """The gateway on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="gateway")
    thread.start()

    async def make() -> Gateway:
        gateway = Gateway(place, plan.listen, plan.fleet_port, upstream)
        await gateway.start()
        return gateway

    try:
        gateway = asyncio.run_coroutine_threadsafe(make(), loop).result()
        try:
            yield gateway
        finally:
            asyncio.run_coroutine_threadsafe(gateway.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _Desk:
    """What the server sees to between two looks at its processes.

    Args:
        place: its folder.
        environment: of Flower's commands.
        address: of the SuperLink, inside.
        metrics: port of the host's counters.
    """

    def __init__(self, place: ServerPlace, environment: dict[str, str], address: str, metrics: int) -> None:
        self._place, self._environment, self._address = place, environment, address
        self._metrics, self._orders = metrics, Orders(place)
        self._restarts, self._looked, self._nodes = -1, 0.0, {"": False}
        self._status: dict[str, Any] = {"superlink": "starting"}
        self._said = ""

    def work(self, children: list[Child]) -> dict[str, Any]:
        """See to nodes, runs and jobs; returns what `fednano status` shows."""
        if time.monotonic() - self._looked > _NODES_EVERY_S:
            self._looked = time.monotonic()
            try:
                with SuperLink(self._address, self._place.credentials.root) as link:
                    self._settle_nodes(link)
                    fresh = children[0].restarts > self._restarts
                    self._restarts = children[0].restarts
                    connected = [s.name for s in self._place.sites().values() if self._nodes.get(s.node_key)]
                    order = self._orders.tend(
                        self._environment, fresh=fresh, connected=connected, clear=link.stop_runs
                    )
                self._status["superlink"] = "up"
                self._status["order"] = asdict(order) if order else None
            except RunError as error:
                self._status["superlink"] = str(error)
            except FednanoError as error:  # such as a damaged file: told, and tried again
                self._complain(str(error))
            self._status["host"] = _counters(self._metrics)
        return {"federation": self._place.federation, "sites": self._shown(), **self._status}

    def _settle_nodes(self, link: SuperLink) -> None:
        """Make the SuperLink's register that of the enrolled sites: theirs and no other keys."""
        nodes = {node.key: node for node in link.nodes()}
        wanted = {s.node_key: s for s in self._place.sites().values() if s.node_key and not s.revoked}
        for key, node in nodes.items():
            if key not in wanted:
                link.unregister(node.id)
                self._place.audit.record("node unregistered", node=str(node.id))
        ids = {key: node.id for key, node in nodes.items()}
        for key, site in wanted.items():
            if key not in ids:
                ids[key] = link.register(key, site.name)
                self._place.audit.record("node registered", site=site.name, node=str(ids[key]))
        if any(site.node != ids[key] for key, site in wanted.items()):
            with self._place.changing_sites() as sites:
                for key, site in wanted.items():
                    if sites[site.name].node_key == key:
                        sites[site.name] = replace(sites[site.name], node=ids[key])
        self._nodes = {key: node.online for key, node in nodes.items()}

    def _shown(self) -> list[dict[str, Any]]:
        return [
            {
                "site": site.name,
                "state": "revoked" if site.revoked else "enrolled" if site.serial else "invited",
                "connected": self._nodes.get(site.node_key, False),
                "certificate_until": site.expires,
            }
            for site in self._place.sites().values()
        ]

    def _complain(self, text: str) -> None:
        if text != self._said:
            say(text)
        self._said = text


def _counters(port: int) -> dict[str, int] | None:
    """The host's counters; ``None`` while it does not serve."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as reply:
            lines = reply.read().decode().splitlines()
    except OSError:
        return None
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#") and "{" not in line]
    return {
        name.removeprefix("fednano_host_").removesuffix("_total"): int(float(value))
        for name, value in pairs
        if name.startswith("fednano_host_")
    }
