"""Who may ask and who may approve: the public keys of a run's sites and approvers, and the run's policy.

One small file, ``unlearning/registry.json``, readable by its owner only because it holds the sites' salts. Whoever may
write it decides who is believed; it is the operator's to protect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fednano.errors import ConfigError, RequestRefused
from fednano.runs.atomic import read_json
from fednano.security.keys import check_name, write_private

__all__ = ["Policy", "Registry", "Site"]


@dataclass(frozen=True)
class Site:
    """A site's entry.

    Attributes:
        public: its public key, hexadecimal.
        salt: what its ids are hashed with, hexadecimal; not to be shown to other sites.
    """

    public: str
    salt: str


@dataclass(frozen=True)
class Policy:
    """What a site may ask for.

    Attributes:
        requests_a_day: accepted requests of one site in 24 hours.
        share: largest part of a site's training samples that its requests for samples and subjects may name within 30
            days; classes and whole clients need approvals instead.
        approvals: by kind of scope, how many different approvers must agree.
    """

    requests_a_day: int = 20
    share: float = 0.25
    approvals: Mapping[str, int] = field(
        default_factory=lambda: {"samples": 0, "subject": 0, "class": 2, "client": 2}
    )

    def __post_init__(self) -> None:
        if self.requests_a_day < 1 or not 0 < self.share <= 1:
            raise ConfigError(
                f"the policy has requests_a_day {self.requests_a_day} and share {self.share}; expected at least 1, and "
                "a number above 0 and at most 1."
            )
        floor = {"samples": 0, "subject": 0, "class": 2, "client": 2}
        for kind, least in floor.items():
            if self.approvals.get(kind, -1) < least:
                raise ConfigError(
                    f"the policy asks {self.approvals.get(kind)} approvals for scope {kind!r}; expected at least "
                    f"{least}."
                )


@dataclass(frozen=True)
class Registry:
    """The registry of one run.

    Attributes:
        path: its file.
        sites: name -> entry.
        approvers: name -> public key.
        policy: what sites may ask for.
    """

    path: Path
    sites: Mapping[str, Site] = field(default_factory=dict)
    approvers: Mapping[str, str] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)

    @classmethod
    def load(cls, path: Path) -> Registry:
        """Read the registry; an empty one where there is none yet.

        Raises:
            ConfigError: the file is damaged.
        """
        if not path.exists():
            return cls(path)
        try:
            body: dict[str, Any] = read_json(path)
            sites = {name: Site(**entry) for name, entry in body["sites"].items()}
            return cls(path, sites, dict(body["approvers"]), Policy(**body["policy"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no registry of keys ({error!r}). Restore it from a backup; keys can be registered again."
            ) from error

    def save(self) -> None:
        """Write the file in one step, mode 0600."""
        body = {
            "sites": {name: vars(site) for name, site in sorted(self.sites.items())},
            "approvers": dict(sorted(self.approvers.items())),
            "policy": {**vars(self.policy), "approvals": dict(self.policy.approvals)},
        }
        write_private(self.path, json.dumps(body, indent=2).encode() + b"\n")

    def with_site(self, name: str, public: str, salt: str, *, known: list[str]) -> Registry:
        """A registry that believes ``public`` for site ``name``.

        Args:
            name: the site.
            public: its key, hexadecimal.
            salt: its salt, hexadecimal.
            known: the sites that took part in the run.

        Raises:
            ConfigError: no such site in the run, another key is registered for it, or the key is somebody else's.
        """
        check_name(name)
        if name not in known:
            raise ConfigError(
                f"site {name!r} took no part in this run. Its sites: {', '.join(sorted(known))}."
            )
        self._check_free(public, name, "site")
        return replace(self, sites={**self.sites, name: Site(public, salt)})

    def with_approver(self, name: str, public: str) -> Registry:
        """A registry in which ``name`` may approve. Raises ConfigError as :meth:`with_site` does."""
        check_name(name)
        self._check_free(public, name, "approver")
        return replace(self, approvers={**self.approvers, name: public})

    def site(self, name: str) -> Site:
        """A site's entry. Raises RequestRefused for an unknown one."""
        if name not in self.sites:
            listed = ", ".join(sorted(self.sites)) or "none"
            raise RequestRefused(
                f"no key is registered for site {name!r}; registered: {listed}. Make and register one with: "
                f"fednano unlearn keygen --site {name} --run RUN"
            )
        return self.sites[name]

    def _check_free(self, public: str, name: str, role: str) -> None:
        for kind, known in (
            ("site", {n: s.public for n, s in self.sites.items()}),
            ("approver", dict(self.approvers)),
        ):
            for other, key in known.items():
                if key == public and (other, kind) != (name, role):
                    raise ConfigError(
                        f"this key belongs to {kind} {other!r} already; one key speaks for one party. Make another."
                    )
                if other == name and kind == role and key != public:
                    raise ConfigError(
                        f"{role} {name!r} is registered with the key {key[:16]}..., got {public[:16]}.... Remove the "
                        f"entry from {self.path} first, if the old key is no longer to be believed."
                    )
