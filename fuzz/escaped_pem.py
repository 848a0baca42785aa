"""nginx's `$ssl_client_escaped_cert`: only what nginx writes for one certificate is read."""

from __future__ import annotations

import ssl
from urllib.parse import quote, unquote_to_bytes

from dstack_mesh.identity import escaped_pem
from fuzz import der
from fuzz.certificates import chain

_BEGIN, _END = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----"


def escaped(certificate: bytes) -> bytes:
    """Write what nginx writes: PEM in lines of 64, all but RFC 3986's unreserved escaped."""
    return quote(ssl.DER_cert_to_PEM_cert(certificate), safe="").encode()


_SMALL = b"\x30\x03\x02\x01\x05"

SEEDS = (
    escaped(_SMALL),
    escaped(_SMALL).replace(b"%0A", b"%0d%0a"),
    b"%20" + escaped(_SMALL) + b"%0A",
    escaped(der.encode(der.SEQUENCE, b"x" * 46)),
    escaped(der.encode(der.SEQUENCE, b"x" * 200)),
    escaped(chain("leaf-a")[0]),
    escaped(b"\x30\x81\x01a"),
    escaped(b"\x04\x01a"),
    escaped(_SMALL) * 2,
    quote(_BEGIN + b"MAMCAQV=\n" + _END, safe="").encode(),
    quote(_BEGIN + b"MAMC\nAQU=\n" + _END, safe="").encode(),
    quote(_BEGIN + _END, safe="").encode(),
    _BEGIN + b"MAMCAQU=\n" + _END,
    b"%",
    b"",
)


def run(data: bytes) -> None:
    whole = der.encode(der.SEQUENCE, data)
    assert escaped_pem.parse_escaped_pem(escaped(whole)) == whole
    try:
        found = escaped_pem.parse_escaped_pem(data)
    except escaped_pem.EscapedPemError as error:
        assert str(error).isprintable()
        assert len(data) < 40 or data.decode("latin-1") not in str(error), "the value is told"
        return
    der.only(found, der.SEQUENCE)
    # One certificate has one text, but for line ends and the white space around it.
    text = unquote_to_bytes(data).strip(b" \t\r\n").replace(b"\r\n", b"\n")
    assert text + b"\n" == ssl.DER_cert_to_PEM_cert(found).encode()
