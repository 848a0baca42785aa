"""Building blocks of dstack's certificates, down to the bytes that its own crate writes.

The object identifiers are written down here once more, on purpose: a simulator that took them
from the code under test would agree with any mistake in it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Sequence

    from dstack_mesh.model import AppId, AppInfo

_ARC = "1.3.6.1.4.1.62397.1"
OID_APP_ID = x509.ObjectIdentifier(f"{_ARC}.3")
OID_USAGE = x509.ObjectIdentifier(f"{_ARC}.4")
OID_ATTESTATION = x509.ObjectIdentifier(f"{_ARC}.8")
OID_APP_INFO = x509.ObjectIdentifier(f"{_ARC}.9")

NOT_BEFORE = 157_766_400
"""1975-01-01T00:00:00Z, when every certificate of dstack begins."""

_TEN_YEARS = 3650 * 86_400

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
Extension = tuple[x509.ExtensionType, bool]
"""An extension and whether it is critical."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A private key with the chain that a peer would show for it."""

    key_pem: bytes
    """PKCS#8."""

    chain_pem: tuple[bytes, ...]
    """Leaf first; from a KMS leaf, app CA, root."""

    @property
    def leaf_pem(self) -> bytes:
        """The first certificate."""
        return self.chain_pem[0]

    @property
    def bundle(self) -> bytes:
        """The whole chain in one PEM text, as `ssl_certificate` of nginx wants it."""
        return b"".join(self.chain_pem)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Make `context` show this chain. The key touches the disk for a moment (mode 0600)."""
        descriptor, name = tempfile.mkstemp(prefix="dstack-sim-", suffix=".pem")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self.key_pem + self.bundle)
            context.load_cert_chain(name)
        finally:
            Path(name).unlink()

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write `cert.pem` (the chain) and `key.pem` (mode 0600) and return their paths."""
        certificate, key = directory / "cert.pem", directory / "key.pem"
        certificate.write_bytes(self.bundle)
        key.touch(mode=0o600)
        key.write_bytes(self.key_pem)
        return certificate, key


def build(
    subject: x509.Name,
    issuer: x509.Name,
    key: PrivateKey,
    issuer_key: PrivateKey,
    extensions: Iterable[Extension],
    *,
    not_before: int = NOT_BEFORE,
    not_after: int,
) -> x509.Certificate:
    """Sign a certificate for `key` with SHA-256; extensions are written in the order given."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(not_before, UTC))
        .not_valid_after(datetime.fromtimestamp(not_after, UTC))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(issuer_key, hashes.SHA256())


def in_ten_years() -> int:
    """Seconds since 1970 at which certificates made now end, unless something else is asked."""
    return int(time.time()) + _TEN_YEARS


def ca_name(common_name: str) -> x509.Name:
    """`O=Dstack, CN=…`, in this order."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Dstack"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def leaf_name(common_name: str) -> x509.Name:
    """`CN=…`, or no name at all for an empty text."""
    if not common_name:
        return x509.Name([])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def octet_string(value: bytes) -> bytes:
    """Wrap in a DER OCTET STRING (X.690 8.7), as dstack's extensions are."""
    size = len(value)
    if size < 0x80:
        return bytes((0x04, size)) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((0x04, 0x80 | len(length))) + length + value


def custom(oid: x509.ObjectIdentifier, content: bytes) -> Extension:
    """One of dstack's own extensions: never critical, content wrapped in an OCTET STRING."""
    return x509.UnrecognizedExtension(oid, octet_string(content)), False


def app_id_extension(app_id: AppId) -> Extension:
    """The extension that makes a certificate one of `app_id`."""
    return custom(OID_APP_ID, bytes.fromhex(app_id))


def usage_extension(usage: str) -> Extension:
    """`app:custom`, `app:ca`, `kms:rpc`, …"""
    return custom(OID_USAGE, usage.encode())


def app_info_extension(info: AppInfo) -> Extension:
    """App info as the KMS writes it: a MessagePack array of byte strings (see protocol facts).

    What `AppInfo` does not carry (measurements, key provider) is made up from what it does.
    """
    measured = hashlib.sha256(b"simulated measurement" + bytes.fromhex(info.compose_hash)).digest()
    fields = (
        bytes.fromhex(info.app_id),
        bytes.fromhex(info.compose_hash),
        bytes.fromhex(info.instance_id),
        bytes.fromhex(info.device_id),
        measured,
        measured,
        bytes.fromhex(info.os_image_hash),
        b'{"name":"kms","id":"simulated"}',
        (),
    )
    return custom(OID_APP_INFO, msgspec.msgpack.encode(fields))


def key_usage(*, ca: bool) -> Extension:
    """Critical. The real certificates pad the bit string to 16 bits, which DER does not; so here.

    CA: digitalSignature, keyCertSign, cRLSign; leaf: digitalSignature (RFC 5280 4.2.1.3).
    """
    bits = 0x86 if ca else 0x80
    encoded = bytes((0x03, 0x03, 0x07, bits, 0x00))
    return x509.UnrecognizedExtension(ExtensionOID.KEY_USAGE, encoded), True


def ca_extensions(key: PrivateKey, path_length: int | None) -> list[Extension]:
    """Key usage, subject key identifier (SHA-256 of the SPKI, cut to 20 bytes), constraints."""
    spki = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    identifier = x509.SubjectKeyIdentifier(hashlib.sha256(spki).digest()[:20])
    constraints = x509.BasicConstraints(ca=True, path_length=path_length)
    return [key_usage(ca=True), (identifier, False), (constraints, True)]


def leaf_extensions(
    alt_names: Sequence[str], *, server_auth: bool, client_auth: bool
) -> list[Extension]:
    """SAN only if asked for, key usage, EKU only if there is any."""
    found: list[Extension] = []
    if alt_names:
        names = [_general_name(name) for name in alt_names]
        found.append((x509.SubjectAlternativeName(names), False))
    found.append(key_usage(ca=False))
    roles = []
    if server_auth:
        roles.append(ExtendedKeyUsageOID.SERVER_AUTH)
    if client_auth:
        roles.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    if roles:
        found.append((x509.ExtendedKeyUsage(roles), False))
    return found


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """PEM text with a final newline."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: PrivateKey) -> bytes:
    """PKCS#8 PEM without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
