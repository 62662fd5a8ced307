"""Unit files for systemd, compose and Kubernetes, made from a federation's plan, so that they agree with it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fednano.deploy.plan import Plan
from fednano.errors import ConfigError

__all__ = ["FORMATS", "render"]

_UNIT = """\
[Unit]
Description=fednano {what} of {name}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={command}
WorkingDirectory={folder}
User={user}
Restart=always
RestartSec=5
KillMode=mixed
TimeoutStopSec=60
NoNewPrivileges=true
PrivateTmp=true
ProtectSystem=strict
ReadWritePaths={folder}
UMask=0077
Environment=HF_HOME={folder}/state/hub

[Install]
WantedBy=multi-user.target
"""

_DOCKERFILE = """\
FROM python:3.12-slim
# In a checkout: docker build -f {file} -t {image} .
COPY . /src
RUN pip install --no-cache-dir /src && useradd --create-home --uid 10001 fednano
USER 10001
WORKDIR /federation
ENTRYPOINT ["fednano"]
"""


def render(plan: Plan, kind: str, folder: Path) -> dict[str, str]:
    """Files by name.

    Args:
        plan: of the federation.
        kind: one of `FORMATS`.
        folder: where the federation's folder lies on the machine that the files are for.

    Raises:
        ConfigError: unknown format.
    """
    if kind not in FORMATS:
        raise ConfigError(f"unknown format {kind!r}; expected one of {', '.join(FORMATS)}.")
    return FORMATS[kind](plan, folder.absolute())


def _systemd(plan: Plan, folder: Path) -> dict[str, str]:
    fednano = Path(sys.executable).parent / "fednano"
    user = os.environ.get("USER") or "fednano"

    def unit(what: str, command: str, where: Path) -> str:
        return _UNIT.format(
            what=what, name=plan.name, command=f"{fednano} {command}", folder=where, user=user
        )

    server = unit("server", f"server up --server {folder / 'server'}", folder / "server")
    # An instance for each bundle: systemctl enable --now fednano-site@site-a
    site = unit("site %i", f"client up --bundle {folder}/%i", folder / "%i")
    return {"fednano-server.service": server, "fednano-site@.service": site}


def _compose(plan: Plan, folder: Path) -> dict[str, str]:
    """Compose files are YAML, of which JSON is a part: written by a serialiser, not by hand."""
    common: dict[str, Any] = {"image": _image(), "restart": "always", "stop_grace_period": "60s"}
    common |= {"read_only": True}
    common |= {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "tmpfs": ["/tmp"]}
    server = {
        **common,
        "command": ["server", "up", "--server", "/federation/server"],
        "volumes": [f"{folder / 'server'}:/federation/server"],
        "environment": {"HF_HOME": "/federation/server/state/hub"},
        "ports": [f"{plan.fleet_port}:{plan.fleet_port}", f"{plan.host_port}:{plan.host_port}"],
    }
    files = {"Dockerfile": _dockerfile(), "compose.server.yaml": _yaml({"services": {"server": server}})}
    for site in plan.sites:
        client = {
            **common,
            "command": ["client", "up", "--bundle", "/federation/site"],
            # The data under the same path inside, since the bundle names it by its path.
            "volumes": [
                f"{folder / site}:/federation/site",
                "${DATA:?folder of this site's data}:${DATA}:ro",
            ],
            "environment": {"HF_HOME": "/federation/site/state/hub"},
        }
        files[f"compose.{site}.yaml"] = _yaml({"services": {"site": client}})
    return files


def _kubernetes(plan: Plan, folder: Path) -> dict[str, str]:
    name = f"fednano-{plan.name.lower().replace('_', '-').replace('.', '-')}"
    labels = {"app": name}
    ports = {"fleet": plan.fleet_port, "host": plan.host_port}
    container = {
        "name": "server",
        "image": _image(),
        "args": ["server", "up", "--server", "/federation/server"],
        "env": [{"name": "HF_HOME", "value": "/federation/server/state/hub"}],
        "ports": [{"name": key, "containerPort": port} for key, port in ports.items()],
        "volumeMounts": [
            {"name": "server", "mountPath": "/federation/server"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "readinessProbe": {"tcpSocket": {"port": plan.host_port}, "periodSeconds": 10},
    }
    if plan.host.device.startswith("cuda"):
        container["resources"] = {"limits": {"nvidia.com/gpu": 1}}
    pod = {
        "terminationGracePeriodSeconds": 60,
        "automountServiceAccountToken": False,
        # No fsGroup: it would let a group read the private keys, which fednano refuses. The volume belongs to 10001.
        "securityContext": {"runAsUser": 10001, "runAsNonRoot": True},
        "containers": [container],
        "volumes": [
            {"name": "server", "persistentVolumeClaim": {"claimName": name}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    documents: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "20Gi"}}},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "serviceName": name,
                "replicas": 1,  # one SuperLink, one database
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {
                "type": "LoadBalancer",  # TLS ends in the server, not before it: certificates of sites must reach it
                "selector": labels,
                "ports": [{"name": key, "port": port, "targetPort": key} for key, port in ports.items()],
            },
        },
    ]
    manifest = "---\n".join(_yaml(document) for document in documents)
    return {"Dockerfile": _dockerfile(), "server.yaml": manifest}


def _image() -> str:
    from fednano import __version__

    return f"fednano:{__version__}"


def _dockerfile() -> str:
    return _DOCKERFILE.format(file="Dockerfile", image=_image())


def _yaml(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


FORMATS: dict[str, Callable[[Plan, Path], dict[str, str]]] = {
    "systemd": _systemd,
    "compose": _compose,
    "kubernetes": _kubernetes,
}
"""What can be rendered."""
