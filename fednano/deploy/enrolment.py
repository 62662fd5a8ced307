"""A site's part in provisioning: it makes its keys, asks for a certificate, and puts it in its place."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_certificate

from fednano.deploy.letters import load_letter, named, openssh_public
from fednano.errors import ConfigError
from fednano.runs.atomic import write_bytes, write_json
from fednano.security.authority import new_key, private_pem, request_certificate
from fednano.security.canonical import canonical
from fednano.security.keys import read_private, write_private
from fednano.security.place import SiteBundle

__all__ = ["enroll", "renew_site"]


def enroll(given: Path, bundle: Path, node_config: dict[str, str | int] | None = None) -> Path:
    """At the site: answer an invitation with a request, or put a signed certificate in its place.

    Args:
        given: an invitation, or what ``fednano deploy sign`` made of the request.
        bundle: folder of the site's keys.
        node_config: what the SuperNode tells its client: ``data``, or ``partition-id`` and ``num-partitions``.

    Returns:
        The request to be sent to the operator, or the bundle.

    Raises:
        ConfigError: the file is neither, or does not fit the bundle.
    """
    said = load_letter(given, {"invitation", "signed"})
    place = SiteBundle(bundle)
    if said["kind"] == "signed":
        return _install(place, said)
    if (bundle / "tls.key").exists() or (bundle / "node.key").exists():
        raise ConfigError(f"{bundle} holds keys already; a key is never written over. Choose another folder.")
    site, tls, node = named(said), new_key(), new_key(ec.SECP384R1())
    write_private(bundle / "tls.key", private_pem(tls))
    write_private(bundle / "node.key", _openssh(node))
    write_bytes(bundle / "node.pub", openssh_public(node.public_key()))
    write_bytes(bundle / "ca.crt", said["authority"].encode())
    facts = {
        "federation": said["federation"],
        "site": site,
        "fleet": said["fleet"],
        "host": said["host"],
        "node_config": node_config or {},
    }
    write_json(bundle / "site.json", facts)
    body = _body(site, tls, (bundle / "node.pub").read_text())
    proof = hmac.new(bytes.fromhex(said["secret"]), canonical(body), hashlib.sha256).hexdigest()
    path = bundle / f"{site}.request.json"
    write_json(path, {**body, "kind": "request", "proof": proof})
    return path


def renew_site(bundle: Path) -> Path:
    """At the site: ask for a certificate on a new key; the present one stays in use until the answer is there.

    Returns:
        The request to be sent to the operator.
    """
    place = SiteBundle(bundle)
    site, own = str(place.facts["site"]), place.credentials
    key = new_key()
    write_private(bundle / "tls.key.new", private_pem(key))
    body = _body(site, key, (bundle / "node.pub").read_text())
    old = serialization.load_pem_private_key(own.key, password=None)
    assert isinstance(old, ec.EllipticCurvePrivateKey)
    proof = old.sign(canonical(body), ec.ECDSA(hashes.SHA256())).hex()
    path = bundle / f"{site}.request.json"
    write_json(path, {**body, "kind": "renewal", "proof": proof, "certificate": own.certificate.decode()})
    return path


def _install(bundle: SiteBundle, said: dict[str, Any]) -> Path:
    """Put a certificate into a bundle, and the key that it is for."""
    if said["site"] != bundle.facts["site"]:
        raise ConfigError(
            f"the certificate is for {said['site']!r}, the bundle is of {bundle.facts['site']!r}."
        )
    pem = str(said["certificate"]).encode()
    try:
        certificate = load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(
            load_pem_x509_certificate((bundle.root / "ca.crt").read_bytes())
        )
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError("the certificate is not signed by this federation's authority.") from error
    for name in ("tls.key.new", "tls.key"):
        path = bundle.root / name
        if not path.exists():
            continue
        key = serialization.load_pem_private_key(read_private(path, "fednano deploy enroll"), password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
            write_private(bundle.root / "tls.key", private_pem(key))
            write_bytes(bundle.root / "tls.crt", pem)
            (bundle.root / "tls.key.new").unlink(missing_ok=True)
            return bundle.root
    raise ConfigError(
        f"the certificate is for none of the keys in {bundle.root}. Send the newest request again."
    )


def _body(site: str, key: ec.EllipticCurvePrivateKey, node_key: str) -> dict[str, Any]:
    return {"site": site, "csr": request_certificate(key, site).decode(), "node_key": node_key}


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
