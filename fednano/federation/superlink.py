"""A SuperLink as its operator sees it: nodes and runs, over its control API on the loopback interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fednano.errors import RunError

__all__ = ["Node", "SuperLink", "write_app"]


@dataclass(frozen=True)
class Node:
    """A SuperNode that is registered.

    Attributes:
        id: Flower's.
        key: its public key, OpenSSH.
        online: whether it is connected.
    """

    id: int
    key: str
    online: bool


class SuperLink:
    """A connection. A context manager.

    Args:
        address: ``HOST:PORT``.
        root: PEM of the authority that signed its certificate.
    """

    def __init__(self, address: str, root: bytes) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=root,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """The nodes that are registered."""
        with _explained():
            reply = self._client.ListNodes(ListNodesRequest())
        return [
            Node(info.node_id, _openssh(info.public_key), info.status == "online")
            for info in reply.nodes_info
            if info.status != "unregistered"
        ]

    def register(self, key: str, name: str) -> int:
        """Register a node key (OpenSSH); returns the node's id."""
        public = serialization.load_ssh_public_key(key.encode())
        pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        with _explained():
            reply = self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
        return int(reply.node_id)

    def stop_runs(self) -> None:
        """Stop whatever Flower takes to be under way, and drop its messages.

        A run whose process was killed counts as running until its heartbeats have been missed for a minute. Until then
        nodes are given its requests, whose content may be lost, and wait for it.
        """
        with _explained():
            reply = self._client.ListRuns(ListRunsRequest())
            for identity, run in reply.run_dict.items():
                if run.status.status != "finished":
                    self._client.StopRun(StopRunRequest(run_id=identity))

    def unregister(self, node: int) -> None:
        """Shut a node out."""
        with _explained():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))


def _openssh(pem: bytes) -> str:
    key = serialization.load_pem_public_key(pem)
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return text.decode()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, FlowerError) as error:
        raise RunError(f"the SuperLink cannot be asked: {error}.") from error


_APP = """\
[project]
name = "fednano-app"
version = "{version}"
description = "fednano's Flower app; the library comes from the environment that it runs in"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fednano"
fab-include = ["server_app/**/*.py", "client_app/**/*.py"]

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
{settings}
"""


def write_app(folder: Path) -> None:
    """Write the Flower app that `flwr run` bundles: the same thin entry points as in a checkout."""
    import json

    from fednano import __version__
    from fednano.federation.config import OTHER_WORK, UNPROTECTED, RunConfig

    folder.mkdir(parents=True, exist_ok=True)
    given = RunConfig().to_mapping() | {OTHER_WORK: "", UNPROTECTED: False}
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in given.items())
    (folder / "pyproject.toml").write_text(_APP.format(version=__version__, settings=settings))
    for name, text in (
        ("server_app", "from fednano.federation.apps import make_server_app\n\napp = make_server_app()\n"),
        ("client_app", 'from fednano.federation.apps import client_app as app\n\n__all__ = ["app"]\n'),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "__init__.py").write_text(
            f'"""fednano\'s Flower app: entry point only."""\n\n{text}'
        )
