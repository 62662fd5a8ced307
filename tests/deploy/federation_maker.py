"""A federation on disk, made the way its people make it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fednano.deploy.enrolment import enroll
from fednano.deploy.plan import Plan
from fednano.deploy.provision import init, sign
from fednano.security.place import ServerPlace, SiteBundle


@dataclass(frozen=True)
class Made:
    """Where everything lies."""

    folder: Path
    place: ServerPlace

    def bundle(self, site: str) -> SiteBundle:
        return SiteBundle(self.folder / site)

    def enroll(self, site: str, bundle: Path | None = None, **node_config: str | int) -> SiteBundle:
        """Invitation to whole bundle."""
        target = bundle or self.folder / site
        request = enroll(self.folder / "invitations" / f"{site}.invitation.json", target, node_config)
        enroll(sign(self.folder, request), target)
        return SiteBundle(target)


def make_federation(folder: Path, *sites: str, **options: object) -> Made:
    """A federation whose server is 127.0.0.1, with these sites enrolled."""
    plan = Plan("hospitals", sites, ("127.0.0.1",), listen="127.0.0.1", **options)  # type: ignore[arg-type]
    made = Made(folder, init(plan, folder))
    for site in sites:
        made.enroll(site)
    return made
