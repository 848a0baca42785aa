"""Certificates for identity's tests: the vectors, and a KMS that can also mint wrong ones."""

from __future__ import annotations

import datetime
import json
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dstack_mesh.identity import extension, tls
from dstack_mesh.identity.chain import spki

CERTS = Path(__file__).parent.parent / "vectors" / "certs"
INDEX: dict[str, dict[str, Any]] = {
    vector["name"]: vector for vector in json.loads((CERTS / "index.json").read_text())["vectors"]
}

APP_A = "aa" * 20
APP_B = "bb" * 20
BOTH_ROLES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
DISTANT_PAST = datetime.datetime(1975, 1, 1, tzinfo=datetime.UTC)
DISTANT_FUTURE = datetime.datetime(2090, 1, 1, tzinfo=datetime.UTC)

CA_OF_LEAVES = x509.BasicConstraints(ca=True, path_length=0)

PrivateKey = Any


def dstack_extension(oid: x509.ObjectIdentifier, content: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(oid, extension.octet_string(content))


def app_id_extension(app_id: str) -> x509.UnrecognizedExtension:
    return dstack_extension(extension.OID_APP_ID, bytes.fromhex(app_id))


def usage_extension(usage: str) -> x509.UnrecognizedExtension:
    return dstack_extension(extension.OID_USAGE, usage.encode())


def app_info_extension(app_id: str, *more: object) -> x509.UnrecognizedExtension:
    fields = [bytes.fromhex(app_id), *(bytes([n]) * 32 for n in range(1, 8)), *more]
    return dstack_extension(extension.OID_APP_INFO, msgspec.msgpack.encode(fields))


@dataclass
class Issued:
    """A certificate, its private key, and the certificates above it."""

    cert: x509.Certificate
    key: PrivateKey
    above: tuple[x509.Certificate, ...] = ()
    signer: PrivateKey = None

    @property
    def chain(self) -> list[bytes]:
        return [cert.public_bytes(serialization.Encoding.DER) for cert in (self.cert, *self.above)]

    @property
    def chain_pem(self) -> tuple[bytes, ...]:
        return tuple(
            cert.public_bytes(serialization.Encoding.PEM) for cert in (self.cert, *self.above)
        )

    @property
    def key_pem(self) -> bytes:
        pkcs8 = serialization.PrivateFormat.PKCS8
        none = serialization.NoEncryption()
        return bytes(self.key.private_bytes(serialization.Encoding.PEM, pkcs8, none))

    @property
    def root_spki(self) -> bytes:
        return spki((self.cert, *self.above)[-1])

    @property
    def credentials(self) -> tls.Credentials:
        return tls.Credentials(self.key_pem, self.chain_pem, self.chain_pem[-1])


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def issue(
    issuer: Issued | None,
    common_name: str,
    extensions: Sequence[x509.ExtensionType],
    *,
    key: PrivateKey = None,
    digest: hashes.HashAlgorithm | None = hashes.SHA256(),  # noqa: B008 - immutable
    not_before: datetime.datetime = DISTANT_PAST,
    not_after: datetime.datetime = DISTANT_FUTURE,
) -> Issued:
    key = key or new_key()
    organization = [] if "CA" not in common_name else [(NameOID.ORGANIZATION_NAME, "Dstack")]
    name = x509.Name(
        [x509.NameAttribute(*pair) for pair in (*organization, (NameOID.COMMON_NAME, common_name))]
    )
    signer = issuer.key if issuer else key
    if isinstance(signer, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey):
        digest = None
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.cert.subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )
    for value in extensions:
        builder = builder.add_extension(value, critical=isinstance(value, x509.BasicConstraints))
    above = (issuer.cert, *issuer.above) if issuer else ()
    return Issued(builder.sign(signer, digest), key, above, signer)


@dataclass
class Kms:
    """Mints as dstack's KMS does; every part can be replaced by a wrong one."""

    root: Issued = field(
        default_factory=lambda: issue(
            None, "Dstack KMS CA", [x509.BasicConstraints(ca=True, path_length=1)]
        )
    )

    def app_ca(
        self,
        app_id: str = APP_A,
        *,
        constraints: x509.BasicConstraints | None = CA_OF_LEAVES,
        extensions: Sequence[x509.ExtensionType] | None = None,
        issuer: Issued | None = None,
        **kw: Any,
    ) -> Issued:
        if extensions is None:
            extensions = [app_id_extension(app_id), usage_extension(extension.USAGE_APP_CA)]
        basic = [constraints] if constraints is not None else []
        return issue(issuer or self.root, "Dstack App CA", [*basic, *extensions], **kw)

    def leaf(
        self,
        app_id: str = APP_A,
        *,
        issuer: Issued | None = None,
        eku: Sequence[x509.ObjectIdentifier] | None = BOTH_ROLES,
        extensions: Sequence[x509.ExtensionType] | None = None,
        more: Sequence[x509.ExtensionType] = (),
        **kw: Any,
    ) -> Issued:
        if extensions is None:
            extensions = [app_id_extension(app_id), usage_extension(extension.USAGE_LEAF)]
        usages = [x509.ExtendedKeyUsage(eku)] if eku is not None else []
        issuer = issuer or self.app_ca(app_id)
        return issue(issuer, "localhost", [*usages, *extensions, *more], **kw)


def repeat_extension(issued: Issued, oid: x509.ObjectIdentifier) -> Issued:
    """Return `issued` with one extension there twice: added to its DER, and signed again.

    `cryptography` neither builds such a certificate nor reads its extensions.
    """
    tbs = issued.cert.tbs_certificate_bytes
    found = issued.cert.extensions.get_extension_for_oid(oid)
    oid_der = _der(0x06, _oid_content(oid))
    repeated = _der(0x30, oid_der + extension.octet_string(found.value.public_bytes()))
    outer, _ = _element(tbs)
    fields = _elements(outer)
    extensions = _element(_element(fields[-1])[0])[0]
    fields[-1] = _der(0xA3, _der(0x30, extensions + repeated))
    return resign(issued, _der(0x30, b"".join(fields)))


def replace_algorithm(issued: Issued, oid: str) -> Issued:
    """Return `issued` with the signature algorithm `oid` (its DER content, hex) said in it."""
    algorithm = _der(0x30, _der(0x06, bytes.fromhex(oid)))
    fields = _elements(_element(issued.cert.tbs_certificate_bytes)[0])
    fields[2] = algorithm
    return resign(issued, _der(0x30, b"".join(fields)), algorithm)


def replace_public_key(issued: Issued, oid: str) -> Issued:
    """Return `issued` with its public key said to be of the kind `oid` (its DER content, hex)."""
    fields = _elements(_element(issued.cert.tbs_certificate_bytes)[0])
    bits = _elements(_element(fields[6])[0])[1]
    fields[6] = _der(0x30, _der(0x30, _der(0x06, bytes.fromhex(oid))) + bits)
    return resign(issued, _der(0x30, b"".join(fields)))


def resign(issued: Issued, tbs: bytes, algorithm: bytes | None = None) -> Issued:
    """Return `issued` with other signed content, signed by whoever signed it (P-256, SHA-256)."""
    signature = issued.signer.sign(tbs, ec.ECDSA(hashes.SHA256()))
    fields = _elements(_element(issued.cert.public_bytes(serialization.Encoding.DER))[0])
    der = _der(0x30, tbs + (algorithm or fields[1]) + _der(0x03, b"\0" + signature))
    return replace(issued, cert=x509.load_der_x509_certificate(der))


def _der(tag: int, content: bytes) -> bytes:
    return bytes([tag]) + extension.octet_string(content)[1:]


def _element(der: bytes) -> tuple[bytes, bytes]:
    """Return the first element's content, and what follows that element."""
    start, length = 2, der[1]
    if length & 0x80:
        start = 2 + (length & 0x7F)
        length = int.from_bytes(der[2:start])
    return der[start : start + length], der[start + length :]


def _elements(content: bytes) -> list[bytes]:
    """Return the elements of a SEQUENCE's content, each with its header."""
    found = []
    while content:
        rest = _element(content)[1]
        found.append(content[: len(content) - len(rest)])
        content = rest
    return found


def _oid_content(oid: x509.ObjectIdentifier) -> bytes:
    first, second, *rest = map(int, oid.dotted_string.split("."))
    content = bytes([first * 40 + second])
    for number in rest:
        digits = [number & 0x7F]
        while number := number >> 7:
            digits.insert(0, number & 0x7F | 0x80)
        content += bytes(digits)
    return content


@pytest.fixture(scope="session")
def kms() -> Kms:
    return Kms()


def shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Do a handshake in memory; return (server's object, client's object) or raise."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_object = server.wrap_bio(to_server, to_client, server_side=True)
    client_object = client.wrap_bio(to_client, to_server, session=session)
    waiting: set[ssl.SSLObject] = {server_object, client_object}
    for _ in range(10):
        for ssl_object in (client_object, server_object):
            try:
                ssl_object.do_handshake()
                waiting.discard(ssl_object)
            except ssl.SSLWantReadError:
                pass
    assert not waiting, "the handshake did not finish"
    return server_object, client_object


@pytest.fixture
def handshake() -> Callable[..., tuple[ssl.SSLObject, ssl.SSLObject]]:
    return shake_hands
