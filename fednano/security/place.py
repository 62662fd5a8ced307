"""The folder of a federation's server, and the bundle of a site: what lies where.

::

    server/                              site-a/ (a site's bundle)
      federation.json  the plan            site.json  name, addresses, data
      ca.crt           the authority       ca.crt     the authority
      server.key .crt  TLS                 tls.key .crt  towards the language host
      tokens.key .pub  signs run tokens    node.key .pub towards the SuperLink (EC P-384, OpenSSH)
      audit.key .pub   signs the log
      audit.jsonl      the log
      sites.json       who is enrolled
      active/RUN       runs whose tokens are good
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError
from fednano.runs.atomic import read_json, write_bytes, write_json
from fednano.security.audit import AuditLog, Auditor, locked
from fednano.security.keys import NAME, load_public, load_signer, read_private
from fednano.security.tokens import Allowance, RunToken, sign_token

__all__ = ["Credentials", "ServerPlace", "Site", "SiteBundle"]


@dataclass(frozen=True)
class Credentials:
    """What one side shows, and whom it believes, on TLS connections. All PEM.

    Attributes:
        root: certificate of the authority.
        key: private key.
        certificate: certificate that belongs to it.
    """

    root: bytes
    key: bytes
    certificate: bytes


@dataclass(frozen=True)
class Site:
    """What a server knows of a site.

    Attributes:
        name: of the site.
        node_key: its public node key, OpenSSH.
        node: id that Flower gave that key; 0 = not registered yet.
        serial: of its newest certificate, hexadecimal.
        previous: serial of the one before, which is good until the site has put the newest in its place.
        expires: end of the newest, ISO 8601.
        revoked: whether it was shut out.
        invitation: SHA-256 of the secret in its unused invitation; empty once used.
    """

    name: str
    node_key: str = ""
    node: int = 0
    serial: str = ""
    previous: str = ""
    expires: str = ""
    revoked: bool = False
    invitation: str = ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}. Is this the right folder?") from error


@dataclass(frozen=True)
class ServerPlace:
    """The folder of a server.

    Attributes:
        root: its path.
    """

    root: Path

    @property
    def plan(self) -> dict[str, Any]:
        """The plan as `fednano deploy init` wrote it.

        Raises:
            ConfigError: this is not the folder of a server.
        """
        path = self.root / "federation.json"
        if not path.is_file():
            raise ConfigError(
                f"{self.root} is not the folder of a server: it has no federation.json. Make one with: fednano deploy "
                "init federation.toml"
            )
        plan: dict[str, Any] = read_json(path)
        return plan

    @property
    def federation(self) -> str:
        """Name of the federation."""
        return str(self.plan["name"])

    @property
    def credentials(self) -> Credentials:
        """The server's own."""
        key = read_private(self.root / "server.key", "fednano deploy init")
        return Credentials(_read(self.root / "ca.crt"), key, _read(self.root / "server.crt"))

    @property
    def audit(self) -> Auditor:
        """The audit log, ready to be written."""
        return Auditor(AuditLog(self.root / "audit.jsonl", self.federation), self.root / "audit.key")

    @property
    def audit_key(self) -> str:
        """Public half of the audit key."""
        return load_public(self.root / "audit.pub")

    def sites(self) -> dict[str, Site]:
        """The sites by name."""
        return {name: Site(name=name, **facts) for name, facts in read_json(self.root / "sites.json").items()}

    @contextmanager
    def changing_sites(self) -> Iterator[dict[str, Site]]:
        """The sites, to be changed in place; written when the block ends well, by one process at a time."""
        with locked(self.root / ".sites.lock"):
            sites = self.sites()
            yield sites
            self.write_sites(sites)

    def write_sites(self, sites: Mapping[str, Site]) -> None:
        """Replace the list of sites."""
        facts: dict[str, object] = {
            name: {key: value for key, value in vars(site).items() if key != "name"}
            for name, site in sorted(sites.items())
        }
        write_json(self.root / "sites.json", facts)

    def issue(self, run: str, site: str, expires: float, allowance: Allowance | None = None) -> bytes:
        """A run token, noted in the audit log.

        Args:
            run: id of the run.
            site: who may use it.
            expires: seconds since 1970.
            allowance: limits; ``None`` takes those of the plan.
        """
        allowed = allowance or Allowance(**self.plan.get("limits", {}))
        token = RunToken(self.federation, run, site, int(expires), allowance=allowed)
        raw = sign_token(token, load_signer(self.root / "tokens.key"))
        self.audit.record("token", id=token.id, run=run, site=site, expires=token.expires)
        return raw

    def activate(self, run: str) -> None:
        """From now on tokens of a run are good; notes this process as the run's."""
        write_bytes(self._active(run), str(os.getpid()).encode())

    def deactivate(self, run: str) -> None:
        """From now on tokens of a run are good no more."""
        self._active(run).unlink(missing_ok=True)

    def is_active(self, run: str) -> bool:
        """Whether tokens of a run are good."""
        return self._active(run).exists()

    def active(self) -> dict[str, int]:
        """The runs whose tokens are good, and the processes that they run in."""
        found = {}
        for path in (self.root / "active").glob("[A-Za-z0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                found[path.name] = int(path.read_bytes())
        return found

    def _active(self, run: str) -> Path:
        if not NAME.fullmatch(run):
            raise ConfigError(f"{run!r} cannot be the id of a run.")
        return self.root / "active" / run


@dataclass(frozen=True)
class SiteBundle:
    """What a site has to take part: its keys, its certificate, and where the server is.

    Attributes:
        root: path of the folder.
    """

    root: Path

    @property
    def facts(self) -> dict[str, Any]:
        """``site.json``: ``site``, ``federation``, ``fleet``, ``host``, ``node_config``.

        Raises:
            ConfigError: this is not a bundle.
        """
        try:
            facts: dict[str, Any] = json.loads(_read(self.root / "site.json"))
        except ValueError as error:
            raise ConfigError(f"{self.root / 'site.json'} is damaged: {error}.") from error
        return facts

    @property
    def credentials(self) -> Credentials:
        """The site's own.

        Raises:
            ConfigError: a file is missing, or the key can be read by others.
        """
        if not (self.root / "tls.crt").exists():
            raise ConfigError(
                f"{self.root} has no certificate yet. Send its request to the operator, and run `fednano deploy "
                "enroll` with the file that comes back."
            )
        key = read_private(self.root / "tls.key", "fednano deploy enroll")
        return Credentials(_read(self.root / "ca.crt"), key, _read(self.root / "tls.crt"))
