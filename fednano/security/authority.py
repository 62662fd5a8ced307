"""A federation's certificate authority: X.509 certificates (RFC 5280) for the server and for each site.

Who asks for a certificate makes the key and sends a certification request (PKCS #10, RFC 2986); the authority never
sees a private key but its own. A certificate's common name is the site's name, which the language host compares with
the token that a call carries.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fednano.errors import ConfigError, RequestRefused
from fednano.security.keys import check_name, read_private, write_private

__all__ = [
    "SERVER",
    "Authority",
    "certificate_facts",
    "new_key",
    "private_pem",
    "request_certificate",
    "require_valid",
]

SERVER = "server"
"""Name in the server's own certificate; no site may have it."""
_EARLY = timedelta(hours=1)  # clocks differ
_YEARS = timedelta(days=3650)


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    """A fresh key, on P-256 unless told otherwise."""
    return ec.generate_private_key(curve or ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS #8 PEM of a key, not encrypted: its file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def request_certificate(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """PEM of a certification request for ``name``, signed with ``key``."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def certificate_facts(pem: bytes) -> tuple[str, str, datetime]:
    """Common name, serial number in hexadecimal, and end of a certificate.

    Raises:
        ValueError: no certificate, or one without exactly one common name, or with a serial number that is not positive
            (RFC 5280, 4.1.2.2).
    """
    certificate = x509.load_pem_x509_certificate(pem)
    if certificate.serial_number <= 0:
        raise ValueError(
            f"the certificate's serial number is {certificate.serial_number}; expected 1 or more"
        )
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(name.value), f"{certificate.serial_number:x}", certificate.not_valid_after_utc


@dataclass(frozen=True)
class Authority:
    """The authority of one federation.

    Attributes:
        key: its private key.
        certificate: its own certificate.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, folder: Path, federation: str) -> Authority:
        """Make the authority of a federation, and its files ``ca.key`` (0600) and ``ca.crt``."""
        check_name(federation)
        key = new_key(ec.SECP384R1())
        subject = _subject(f"{federation} authority")
        builder = _builder(subject, subject, key.public_key(), _YEARS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(authority=True), critical=True)
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(own, critical=False)
        made = cls(key, builder.sign(key, hashes.SHA384()))
        write_private(folder / "ca.key", private_pem(key))
        (folder / "ca.crt").write_bytes(made.pem)
        return made

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Read the files that :meth:`create` wrote.

        Raises:
            ConfigError: they are missing, damaged, or the key can be read by others.
        """
        try:
            key = serialization.load_pem_private_key(
                read_private(folder / "ca.key", "fednano deploy init"), password=None
            )
            certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"the authority in {folder} cannot be read: {error}.") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}.")
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue_server(self, key: ec.EllipticCurvePublicKey, names: Sequence[str], days: int) -> bytes:
        """PEM of the server's certificate for these host names and addresses, and for loopback."""
        hosts = dict.fromkeys([*names, "localhost", "127.0.0.1"])
        extension = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._issue(SERVER, key, extension, days)

    def issue_site(self, request: bytes, site: str, days: int) -> bytes:
        """PEM of a site's certificate for its certification request.

        Raises:
            RequestRefused: the request is damaged, not signed by its own key, weak, or for another name.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            (name,) = asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            valid = asked.is_signature_valid
        except (ValueError, InvalidSignature) as error:
            raise RequestRefused(f"the certification request cannot be read: {error}.") from error
        key = asked.public_key()
        if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or key.key_size < 256:
            raise RequestRefused(
                "the certification request is not signed by the EC key (256 bits or more) that it is for."
            )
        if name.value != site:
            raise RequestRefused(f"the certification request is for {name.value!r}, expected {site!r}.")
        urn = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:fednano:site:{site}")])
        return self._issue(site, key, urn, days)

    def _issue(
        self, name: str, key: ec.EllipticCurvePublicKey, names: x509.SubjectAlternativeName, days: int
    ) -> bytes:
        builder = _builder(_subject(name), self.certificate.subject, key, timedelta(days=days))
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        purposes = purposes if name == SERVER else purposes[:1]
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(authority=False), True),
            (x509.ExtendedKeyUsage(purposes), False),
            (names, False),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False),
        ]
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def require_valid(pem: bytes, renew: str, *, now: datetime | None = None) -> None:
    """See that a certificate's time has come and is not over, by this machine's clock.

    Args:
        pem: the certificate.
        renew: how to get another one.
        now: the time, by default this machine's.

    Raises:
        ConfigError: it has expired, or is not valid yet.
    """
    certificate, moment = x509.load_pem_x509_certificate(pem), now or datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if moment > end:
        raise ConfigError(
            f"the certificate of {name.value!s} expired at {end:%Y-%m-%d %H:%M} UTC; this machine's clock says "
            f"{moment:%Y-%m-%d %H:%M}. Renew it: {renew}"
        )
    if moment < begin:
        raise ConfigError(
            f"the certificate of {name.value!s} is valid from {begin:%Y-%m-%d %H:%M} UTC on; this machine's clock says "
            f"{moment:%Y-%m-%d %H:%M}. Set the clock right."
        )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, span: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _EARLY).not_valid_after(now + span)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
