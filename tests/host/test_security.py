"""Tokens, TLS, and the rule that plain text stays on this machine."""

from __future__ import annotations

import base64
import datetime
import ipaddress
import logging
from dataclasses import dataclass

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tiny_host import make_batch, take_step

from fednano.errors import ConfigError, HostRefused, HostUnavailable
from fednano.host import Claims, HostSecurity, RemoteLLM, StaticTokens, TokenRefusedError, new_token, serve
from fednano.host.proto import language_host_pb2 as pb
from fednano.host.proto.language_host_pb2_grpc import LanguageHostStub
from fednano.host.security import bearer, is_loopback, parse_bearer
from fednano.models.language import LocalLLM


@dataclass(frozen=True)
class Authority:
    """A certificate authority that lives for one test session."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, address: str | None = "127.0.0.1") -> tuple[bytes, bytes]:
        """PEM key and certificate for ``name``, valid at ``address``."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [x509.DNSName(name)]
        if address:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(address)))
        certificate = (
            _builder(name, self.certificate.subject, key)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return pem, certificate.public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
    )


def authority(name: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, _name(name), key)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return Authority(key, builder.sign(key, hashes.SHA256()))


@pytest.fixture(scope="module")
def trusted() -> Authority:
    return authority("trusted")


def tls(by: Authority, **options: object) -> HostSecurity:
    key, certificate = by.issue("localhost")
    return HostSecurity(certificate=certificate, key=key, **options)  # type: ignore[arg-type]


def test_tls_works_and_the_log_says_so(
    local: LocalLLM, trusted: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fednano.host")
    want = take_step(local, make_batch([4, 7]))
    with (
        serve(local, security=tls(trusted)) as host,
        RemoteLLM(host.address, root_certificates=trusted.pem, retry_seconds=5) as remote,
    ):
        assert take_step(remote, make_batch([4, 7]))[1].equal(want[1])
    assert f"language host at {host.address} (TLS)" in caplog.text
    assert "without TLS" not in caplog.text


def test_a_plain_connection_to_a_tls_host_fails_clearly(local: LocalLLM, trusted: Authority) -> None:
    with (
        serve(local, security=tls(trusted)) as host,
        RemoteLLM(host.address, insecure=True, retry_seconds=0.3) as plain,
        pytest.raises(HostUnavailable, match="if it uses TLS, pass root_certificates instead of insecure"),
    ):
        plain.describe()


def test_tls_to_a_plain_host_fails_clearly(local: LocalLLM, trusted: Authority) -> None:
    with (
        serve(local) as host,
        RemoteLLM(host.address, root_certificates=trusted.pem, retry_seconds=0.3) as remote,
        pytest.raises(HostRefused, match=r"no TLS connection to .* Check that the host uses TLS"),
    ):
        remote.describe()


def test_a_host_signed_by_somebody_else_is_not_trusted(local: LocalLLM, trusted: Authority) -> None:
    with (
        serve(local, security=tls(authority("other"))) as host,
        RemoteLLM(host.address, root_certificates=trusted.pem, retry_seconds=30) as remote,
        pytest.raises(HostRefused, match="that root_certificates signed its certificate"),
    ):
        remote.describe()


def test_a_certificate_for_another_address_is_not_trusted(local: LocalLLM, trusted: Authority) -> None:
    key, certificate = trusted.issue("elsewhere.example", address=None)
    with (
        serve(local, security=HostSecurity(certificate=certificate, key=key)) as host,
        RemoteLLM(host.address, root_certificates=trusted.pem, retry_seconds=30) as remote,
        pytest.raises(HostRefused, match="that the certificate names this address"),
    ):
        remote.describe()


def test_client_certificates(local: LocalLLM, trusted: Authority) -> None:
    key, certificate = trusted.issue("client")
    with serve(local, security=tls(trusted, client_ca=trusted.pem)) as host:
        shown = {"root_certificates": trusted.pem, "client_key": key, "client_certificate": certificate}
        with RemoteLLM(host.address, retry_seconds=5, **shown) as remote:  # type: ignore[arg-type]
            take_step(remote, make_batch([4]))
        with (
            RemoteLLM(host.address, root_certificates=trusted.pem, retry_seconds=0.3) as stranger,
            pytest.raises(HostUnavailable, match="no language host answers"),
        ):
            stranger.describe()


def test_tokens(local: LocalLLM, trusted: Authority) -> None:
    token, other = new_token(), new_token()
    security = tls(trusted, verifier=StaticTokens({"site-1": token, "site-2": other}))
    with serve(local, security=security) as host:
        for good in (token, other):
            with RemoteLLM(host.address, token=good, root_certificates=trusted.pem) as remote:
                take_step(remote, make_batch([4]))
        for bad, reason in (
            (None, "no token"),
            (new_token(), "unknown token"),
            (token[:-1], "unknown token"),
        ):
            with RemoteLLM(host.address, token=bad, root_certificates=trusted.pem) as remote:
                with pytest.raises(
                    HostRefused, match=f"refused the token .*{reason}.* Pass the token of this run"
                ):
                    remote.describe()
                with pytest.raises(HostRefused, match="refused the token"):
                    remote.stats()
                assert remote.wire.calls == 2  # no repetition
        assert host.stats()["refused_auth"] == 6


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer !!!!", "Basic abcd", "Bearer äöü"])
def test_malformed_tokens_are_refused(value: str) -> None:
    with pytest.raises(TokenRefusedError, match="malformed token"):
        parse_bearer(value)


def test_every_method_asks_for_the_token(local: LocalLLM) -> None:
    seen: list[tuple[str, str]] = []

    class Picky:
        def verify(self, token: bytes, *, method: str, peer: str, certificate: bytes | None) -> Claims:
            assert certificate is None
            seen.append((method, peer.partition(":")[0]))
            if method in ("step", "generate"):
                raise TokenRefusedError(f"not for {method}")
            return Claims()

    with (
        serve(local, security=HostSecurity(verifier=Picky())) as host,
        grpc.insecure_channel(host.address) as channel,
    ):
        stub, metadata = LanguageHostStub(channel), (bearer(b"x" * 16),)
        stub.Describe(pb.DescribeRequest(), metadata=metadata, timeout=20)
        stub.Stats(pb.StatsRequest(), metadata=metadata, timeout=20)
        for call, request in ((stub.Step, pb.StepRequest()), (stub.Generate, pb.GenerateRequest())):
            with pytest.raises(grpc.RpcError, match="not for"):
                list(call(iter([request]), metadata=metadata, timeout=20))
            with pytest.raises(grpc.RpcError, match="no token"):
                list(call(iter([request]), timeout=20))
    assert seen == [("describe", "ipv4"), ("stats", "ipv4"), ("step", "ipv4"), ("generate", "ipv4")]


def test_a_token_survives_the_metadata() -> None:
    for length in range(16, 40):
        token = bytes(range(200, 200 + length - 16)) + b"\xff\xfe\xfb" * 5 + b"\x00"
        name, value = bearer(token)
        assert name == "authorization"
        assert parse_bearer(value) == token
        assert value == "Bearer " + base64.urlsafe_b64encode(token).decode()


def test_token_sets_are_checked() -> None:
    with pytest.raises(ConfigError, match="tokens: got none"):
        StaticTokens([])
    with pytest.raises(ConfigError, match="shorter than 16 bytes"):
        StaticTokens([b"secret"])
    claims = StaticTokens([b"a" * 16, b"b" * 16]).verify(b"b" * 16, method="step", peer="", certificate=None)
    assert claims == Claims("run-1")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:50051", "host.example:50051", "*:1"])
def test_plain_text_stays_on_this_machine(local: LocalLLM, address: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"refusing to listen at .* without TLS"),
        serve(local, listen=address),
    ):
        pass
    with pytest.raises(ConfigError, match=r"refusing to talk to .* without TLS"):
        RemoteLLM(address, insecure=True)


def test_loopback_addresses(local: LocalLLM, caplog: pytest.LogCaptureFixture) -> None:
    for address in ("127.0.0.1:1", "127.3.2.1:1", "[::1]:1", "localhost:1", "unix:/tmp/socket"):
        assert is_loopback(address)
    with serve(local, listen="localhost:0") as host, RemoteLLM(host.address, insecure=True) as remote:
        assert remote.hidden_size == local.hidden_size
    assert "without TLS: for this machine only" in caplog.text
    assert "admits callers without a token" in caplog.text


def test_half_of_a_tls_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="a certificate without its key"):
        HostSecurity(certificate=b"x")
    with pytest.raises(ConfigError, match="a key without its certificate"):
        HostSecurity(key=b"x")
    with pytest.raises(ConfigError, match="client certificates need TLS"):
        HostSecurity(client_ca=b"x")
