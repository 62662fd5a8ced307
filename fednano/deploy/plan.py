"""``federation.toml``: the one description from which a federation's files are made."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError
from fednano.host_settings import HostSettings, known_keys, right_kinds
from fednano.security.authority import SERVER
from fednano.security.keys import check_name
from fednano.security.tokens import Allowance

__all__ = ["EXAMPLE", "HostSettings", "Plan"]

EXAMPLE = """\
name = "hospitals"                 # of the federation
sites = ["site-a", "site-b"]       # who may enrol

[server]
names = ["fl.example.org"]         # host names or addresses; the first is the one that sites dial
listen = "0.0.0.0"                 # address to listen at
fleet-port = 9443                  # SuperNodes: once a round
host-port = 9444                   # language host: every step

[host]
model = "tiny"                     # 'tiny', a folder, or a Hugging Face id
device = "cpu"
dtype = "float32"
workers = 2                        # steps computed at one time

[limits]                           # of each site's run tokens; these are the defaults
calls-per-minute = 6000
open-calls = 32
request-bytes = 268435456
buffered-bytes = 1073741824
"""


@dataclass(frozen=True)
class Plan:
    """What a federation is.

    Attributes:
        name: of the federation.
        sites: names of those who may enrol.
        names: host names and addresses of the server; the first is the one that sites dial.
        listen: address that the server listens at.
        fleet_port: port of the gateway to the SuperLink.
        host_port: port of the language host.
        host: how the language host runs.
        limits: of each site's run tokens.
        certificate_days: how long certificates hold.

    Raises:
        ConfigError: a value is wrong.
    """

    name: str
    sites: tuple[str, ...]
    names: tuple[str, ...]
    listen: str = "0.0.0.0"
    fleet_port: int = 9443
    host_port: int = 9444
    host: HostSettings = field(default_factory=HostSettings)
    limits: Allowance = field(default_factory=Allowance)
    certificate_days: int = 365

    def __post_init__(self) -> None:
        for name in (self.name, *self.sites):
            check_name(name)
        if not self.sites or len(set(self.sites)) < len(self.sites) or SERVER in self.sites:
            raise ConfigError(
                f"sites is {list(self.sites)}; expected different names, none of them {SERVER!r}."
            )
        if not self.names or not all(self.names):
            raise ConfigError(
                "server.names is empty; expected the host name or address that sites dial, as in "
                'names = ["fl.example.org"].'
            )
        for what, port in (("fleet-port", self.fleet_port), ("host-port", self.host_port)):
            if not 0 < port < 65_536:
                raise ConfigError(f"server.{what} is {port}; expected 1 to 65535.")
        if self.fleet_port == self.host_port:
            raise ConfigError(
                f"server.fleet-port and host-port are both {self.host_port}; expected two ports."
            )
        if self.certificate_days < 1:
            raise ConfigError(f"certificate-days is {self.certificate_days}; expected at least 1.")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a ``federation.toml``.

        Raises:
            ConfigError: it cannot be read, a key is unknown, or a value is wrong.
        """
        try:
            content = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}. It looks like this:\n\n{EXAMPLE}") from error
        return cls.from_mapping(content, str(path))

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], where: str) -> Plan:
        """The plan that a TOML document says; see :meth:`read`."""
        top = dict(content)
        server, host, limits = (
            _table(top.pop(name, {}), name, where) for name in ("server", "host", "limits")
        )
        known = {spec.name for spec in fields(cls)} - {"host", "limits"}
        ours = {"name", "sites", "certificate_days"}
        values = {
            **known_keys(top, ours, where, ""),
            **known_keys(server, known - ours, where, "server."),
        }
        for name in ("name", "sites", "names"):
            if name not in values:
                raise ConfigError(f"{where} lacks {name!r}. It looks like this:\n\n{EXAMPLE}")
        for name in ("sites", "names"):
            if not isinstance(values[name], list) or not all(isinstance(each, str) for each in values[name]):
                raise ConfigError(f"{where}: {name} is {values[name]!r}; expected a list of texts.")
            values[name] = tuple(values[name])
        return cls(
            **right_kinds(cls, values, where),
            host=HostSettings.from_mapping(host, where, "host."),
            limits=Allowance(
                **known_keys(limits, {spec.name for spec in fields(Allowance)}, where, "limits.")
            ),
        )

    @property
    def fleet(self) -> str:
        """``HOST:PORT`` that SuperNodes dial."""
        return f"{_bracketed(self.names[0])}:{self.fleet_port}"

    @property
    def language_host(self) -> str:
        """``HOST:PORT`` of the language host."""
        return f"{_bracketed(self.names[0])}:{self.host_port}"

    def to_json(self) -> dict[str, Any]:
        """What the server's folder keeps: the whole plan, with the addresses that follow from it."""
        plan = asdict(self)
        return {**plan, "fleet": self.fleet, "host": self.language_host, "host_settings": plan["host"]}

    @classmethod
    def from_json(cls, plan: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`to_json`."""
        values = {spec.name: plan[spec.name] for spec in fields(cls)}
        values |= {"sites": tuple(plan["sites"]), "names": tuple(plan["names"])}
        values |= {"host": HostSettings(**plan["host_settings"]), "limits": Allowance(**plan["limits"])}
        return cls(**values)


def _table(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name} is {value!r}; expected a table [{name}].")
    return value


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
