"""Who belongs to a federation: invitations, requests, certificates; renewals and revocation.

::

    operator                                   site
    deploy init    ── SITE.invitation.json ──> deploy enroll       makes tls.key, node.key
    deploy sign    <── SITE.request.json ─────
                   ── SITE.signed.json ──────> deploy enroll       the bundle is whole

Private keys are made where they are used and never leave. An invitation holds a secret that proves a request to come
from whom it was sent to (HMAC-SHA-256, RFC 2104) and is good once; send it by a way that only the site can read. A
renewal is proved by the key that the site has. This module is the operator's part, `enrolment` the site's.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_certificate

from fednano.deploy.letters import load_letter, named, openssh_public
from fednano.deploy.plan import Plan
from fednano.errors import ConfigError, RequestRefused
from fednano.runs.atomic import write_bytes, write_json
from fednano.security.authority import (
    SERVER,
    Authority,
    certificate_facts,
    new_key,
    private_pem,
)
from fednano.security.canonical import canonical
from fednano.security.keys import NAME, create_key, read_private, write_private
from fednano.security.place import ServerPlace, Site

__all__ = ["init", "invite", "renew_server", "revoke", "sign"]


def init(plan: Plan, folder: Path) -> ServerPlace:
    """Make a federation: ``authority/``, ``server/`` and an invitation for each site in ``invitations/``.

    Raises:
        ConfigError: the folder holds a federation already.
    """
    if (folder / "authority").exists() or (folder / "server").exists():
        raise ConfigError(
            f"{folder} holds a federation already; keys are never written over. Choose another folder, or change that "
            "one with: fednano deploy invite, renew, revoke"
        )
    place = ServerPlace(folder / "server")
    place.root.mkdir(parents=True)
    (folder / "authority").mkdir()
    Authority.create(folder / "authority", plan.name)
    write_json(place.root / "federation.json", plan.to_json())
    write_bytes(place.root / "ca.crt", (folder / "authority" / "ca.crt").read_bytes())
    for name in ("tokens", "audit"):
        create_key(place.root, name)
    place.write_sites({})
    place.audit.record("federation made", federation=plan.name, sites=list(plan.sites))
    renew_server(folder)
    for site in plan.sites:
        invite(folder, site)
    return place


def renew_server(folder: Path) -> None:
    """A new TLS key and certificate for the server."""
    place, authority = ServerPlace(folder / "server"), Authority.load(folder / "authority")
    plan, key = Plan.from_json(place.plan), new_key()
    pem = authority.issue_server(key.public_key(), plan.names, plan.certificate_days)
    write_private(place.root / "server.key", private_pem(key))
    write_bytes(place.root / "server.crt", pem)
    _, serial, end = certificate_facts(pem)
    place.audit.record("certificate", name=SERVER, serial=serial, expires=end.isoformat())


def invite(folder: Path, site: str) -> Path:
    """A new invitation for a site: one that is new, lost its keys, or was revoked and may come back.

    Returns:
        The file to be sent to the site.
    """
    place = ServerPlace(folder / "server")
    if not NAME.fullmatch(site) or site == SERVER:
        raise ConfigError(f"{site!r} cannot be the name of a site.")
    plan, secret = Plan.from_json(place.plan), secrets.token_hex(32)
    invitation = {
        "kind": "invitation",
        "federation": plan.name,
        "site": site,
        "fleet": plan.fleet,
        "host": plan.language_host,
        "authority": (place.root / "ca.crt").read_text(),
        "secret": secret,
    }
    path = folder / "invitations" / f"{site}.invitation.json"
    write_private(path, json.dumps(invitation, indent=1).encode() + b"\n")
    with place.changing_sites() as sites:
        digest = hashlib.sha256(bytes.fromhex(secret)).hexdigest()
        sites[site] = replace(sites.get(site, Site(site)), invitation=digest)
    place.audit.record("invited", site=site)
    return path


def sign(folder: Path, request: Path) -> Path:
    """At the server: check a site's request and certify its key.

    Returns:
        The file to be sent back to the site.

    Raises:
        RequestRefused: it does not come from whom the invitation was sent to, or was answered already.
    """
    place, authority = ServerPlace(folder / "server"), Authority.load(folder / "authority")
    asked = load_letter(request, {"request", "renewal"})
    site = named(asked)
    try:
        with place.changing_sites() as sites:
            pem = _certify(folder, place, authority, sites, site, asked)
    except RequestRefused as error:
        place.audit.record("request refused", site=site, reason=str(error))
        raise
    _, serial, end = certificate_facts(pem)
    place.audit.record("certificate", name=site, serial=serial, expires=end.isoformat())
    (folder / "invitations" / f"{site}.invitation.json").unlink(missing_ok=True)
    path = folder / "invitations" / f"{site}.signed.json"
    write_json(
        path, {"kind": "signed", "site": site, "certificate": pem.decode(), "expires": end.isoformat()}
    )
    return path


def _certify(
    folder: Path,
    place: ServerPlace,
    authority: Authority,
    sites: dict[str, Site],
    site: str,
    asked: dict[str, Any],
) -> bytes:
    """Check a request, note its outcome in ``sites``, and return the certificate."""
    known = sites.get(site)
    if known is None:
        raise RequestRefused(f"no site {site!r} was invited. Invite it with: fednano deploy invite {site}")
    body = {name: asked[name] for name in ("site", "csr", "node_key")}
    renewal = asked["kind"] == "renewal"
    if renewal:
        _prove_renewed(known, body, asked, authority)
    else:
        _prove_invited(folder, known, body, asked)
    node_key = _node_key(asked["node_key"])
    if any(other.node_key == node_key and other.name != site for other in sites.values()):
        raise RequestRefused("another site has the same node key. Make new ones with: fednano deploy enroll")
    pem = authority.issue_site(asked["csr"].encode(), site, Plan.from_json(place.plan).certificate_days)
    _, serial, end = certificate_facts(pem)
    node = known.node if node_key == known.node_key else 0
    sites[site] = Site(site, node_key, node, serial, known.serial if renewal else "", end.isoformat())
    return pem


def revoke(folder: Path, site: str) -> None:
    """Shut a site out: its certificates, its tokens and its node key are worth nothing from now on.

    Raises:
        ConfigError: no such site.
    """
    place = ServerPlace(folder / "server")
    with place.changing_sites() as sites:
        if site not in sites:
            raise ConfigError(
                f"no site {site!r} is enrolled. There are: {', '.join(sorted(sites)) or 'none'}."
            )
        sites[site] = replace(sites[site], revoked=True, invitation="")
    place.audit.record("revoked", site=site, serial=sites[site].serial)


def _prove_invited(folder: Path, known: Site, body: dict[str, Any], asked: dict[str, Any]) -> None:
    path = folder / "invitations" / f"{known.name}.invitation.json"
    if not known.invitation or not path.exists():
        raise RequestRefused(
            f"the invitation of {known.name} has been used or withdrawn. Invite it anew with: fednano deploy invite "
            f"{known.name}"
        )
    secret = bytes.fromhex(json.loads(read_private(path, "fednano deploy invite"))["secret"])
    proof = hmac.new(secret, canonical(body), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(proof, str(asked.get("proof", ""))):
        raise RequestRefused(f"the request was not made with the newest invitation of {known.name}.")


def _prove_renewed(known: Site, body: dict[str, Any], asked: dict[str, Any], authority: Authority) -> None:
    if known.revoked:
        raise RequestRefused(
            f"{known.name} is revoked; it cannot renew. Invite it anew: fednano deploy invite"
        )
    try:
        old = load_pem_x509_certificate(str(asked.get("certificate", "")).encode())
        old.verify_directly_issued_by(authority.certificate)
        key = old.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        proof = bytes.fromhex(str(asked.get("proof", "")))
        key.verify(proof, canonical(body), ec.ECDSA(hashes.SHA256()))
    except (ValueError, TypeError, AssertionError, InvalidSignature) as error:
        raise RequestRefused(f"the renewal is not signed with the key of {known.name}.") from error
    if f"{old.serial_number:x}" != known.serial:
        raise RequestRefused(
            f"the renewal is signed with a certificate of {known.name} that is not its newest."
        )


def _node_key(text: str) -> str:
    """A node key as Flower registers it; refuses what Flower would."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, TypeError) as error:
        raise RequestRefused(f"the node key cannot be read: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.key_size < 256:
        raise RequestRefused("the node key is not an EC key of 256 bits or more.")
    return openssh_public(key).decode()
