"""The bytes that the simulator mints, held against certificates of the real software."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from dstack_mesh.sim import certificates as certs

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("size", "prefix"),
    [(0, "0400"), (20, "0414"), (127, "047f"), (128, "048180"), (256, "04820100")],
)
def test_octet_string_has_the_shortest_length(size: int, prefix: str) -> None:
    assert certs.octet_string(b"x" * size) == bytes.fromhex(prefix) + b"x" * size


def test_empty_common_name_is_an_empty_name() -> None:
    assert certs.leaf_name("") == x509.Name([])


def test_alt_names_are_addresses_where_they_read_as_such() -> None:
    extension, critical = certs.leaf_extensions(
        ("a.example", "127.0.0.1", "::1"), server_auth=False, client_auth=False
    )[0]
    assert isinstance(extension, x509.SubjectAlternativeName)
    assert not critical
    assert extension.get_values_for_type(x509.DNSName) == ["a.example"]
    found = [str(address) for address in extension.get_values_for_type(x509.IPAddress)]
    assert found == ["127.0.0.1", "::1"]


def test_issued_is_written_and_loaded(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = certs.leaf_name("localhost")
    certificate = certs.build(name, name, key, key, [], not_after=certs.NOT_BEFORE + 1)
    issued = certs.Issued(certs.key_pem(key), (certs.certificate_pem(certificate),))

    certificate_path, key_path = issued.write(tmp_path)

    assert key_path.stat().st_mode & 0o777 == 0o600
    assert re.match(rb"-----BEGIN PRIVATE KEY-----\n", key_path.read_bytes())
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate_path, key_path)
    issued.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
