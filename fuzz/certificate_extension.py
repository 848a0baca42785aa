"""dstack's certificate extensions: read exactly where they are what the KMS writes."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from cryptography import x509

from dstack_mesh.identity import extension
from dstack_mesh.identity.extension import ExtensionError
from dstack_mesh.model import AppInfo
from fuzz import der
from fuzz.certificates import chain
from fuzz.program import Program

_ARC = bytes.fromhex("2b0601040183e73d01")  # 1.3.6.1.4.1.62397.1
APP_ID, USAGE, APP_INFO, OTHER = (_ARC + bytes((number,)) for number in (3, 4, 9, 77))
_KINDS = (APP_ID, USAGE, APP_INFO, OTHER)
_STANDARD = bytes.fromhex("551d13")  # basicConstraints, which the library parses itself
_KIND, _CRITICAL, _BARE, _PARSED = 3, 4, 8, 16
_MAX_ITEMS = 6

_SHORT_INFO = msgspec.msgpack.encode([b"\xaa" * 19, *(b"a" for _ in range(7))])
_INFO = msgspec.msgpack.encode([b"\xaa" * 20, *(bytes([n]) * (n + 1) for n in range(7))])

# For each extension: its flags, the length of its value, the value.
SEEDS = (
    b"\x02" + bytes([len(_SHORT_INFO)]) + _SHORT_INFO,
    b"\x00\x14" + b"\xaa" * 20,
    b"\x08\x16\x04\x14" + b"\xaa" * 20,
    b"\x08\x17\x04\x81\x14" + b"\xaa" * 20,
    b"\x00\x13" + b"\xaa" * 19,
    b"\x00\x14" + b"\xaa" * 20 + b"\x00\x14" + b"\xbb" * 20,
    b"\x00\x14" + b"\xaa" * 20 + b"\x05\x0aapp:custom" + b"\x02" + bytes([len(_INFO)]) + _INFO,
    b"\x01\x02\xff\xfe",
    b"\x03\x01a\x03\x01b",
    b"\x10\x05abcde",
    b"\x00\x14" + b"\xaa" * 20 + b"\x18\x02\x30\x00",
    b"\x02\x05\x98\x01\x02\x03\x04",
    b"\x02\x17\x91\xc4\x14" + b"\xaa" * 20,
)


def run(data: bytes) -> None:
    program = Program(data)
    items: list[tuple[bytes, bytes]] = []
    block = b""
    while program.left and len(items) < _MAX_ITEMS:
        flags = program.byte()
        value = program.take(program.byte())
        if not flags & _BARE:
            value = der.encode(der.OCTET_STRING, value)
        oid = _STANDARD if flags & _PARSED else _KINDS[flags & _KIND]
        items.append((oid, value))
        block += _encoded(oid, value, critical=bool(flags & _CRITICAL))
    cert = x509.load_der_x509_certificate(der.with_extensions(chain("leaf-a")[0], block))
    values = dict(items)

    found = [_read(reader, cert) for reader in _READERS]
    if len(values) != len(items):
        assert found == [_REFUSED] * 3, "an extension was there twice"
        return
    if _STANDARD in values and found == [_REFUSED] * 3:
        return
    app_id, usage, app_info = found
    assert app_id == _expected_app_id(values.get(APP_ID))
    assert usage == _expected_usage(values.get(USAGE))
    _check_app_info(app_info, values.get(APP_INFO))


_REFUSED = "refused"
_READERS = (
    lambda cert: extension.app_id(cert),
    lambda cert: extension.usage(cert),
    lambda cert: extension.app_info(cert),
)


def _read(reader: Callable[[x509.Certificate], object], cert: x509.Certificate) -> object:
    try:
        return reader(cert)
    except ExtensionError as error:
        assert str(error).isprintable(), str(error)
        return _REFUSED


def _encoded(oid: bytes, value: bytes, *, critical: bool) -> bytes:
    mark = der.encode(der.BOOLEAN, b"\xff") if critical else b""
    parts = der.encode(der.OID, oid), mark, der.encode(der.OCTET_STRING, value)
    return der.encode(der.SEQUENCE, *parts)


def _content(value: bytes) -> bytes | None:
    try:
        return der.only(value, der.OCTET_STRING)
    except ValueError:
        return None


def _expected_app_id(value: bytes | None) -> str:
    """There is one encoding: `04 14` and 20 bytes."""
    if value is None or len(value) != 22 or value[:2] != b"\x04\x14":
        return _REFUSED
    return value[2:].hex()


def _expected_usage(value: bytes | None) -> str | None:
    if value is None:
        return None
    content = _content(value)
    try:
        return _REFUSED if content is None else content.decode()
    except UnicodeDecodeError:
        return _REFUSED


def _check_app_info(found: object, value: bytes | None) -> None:
    if value is None:
        assert found is None
        return
    content = _content(value)
    if found is _REFUSED:
        return
    assert content is not None, "app info out of what is no OCTET STRING"
    wire = msgspec.msgpack.decode(content, strict=True)
    assert isinstance(wire, list)
    assert len(wire) >= 8
    said = [one.encode() if isinstance(one, str) else bytes(one) for one in wire[:8]]
    assert len(said[0]) == 20
    assert isinstance(found, AppInfo)
    assert (found.app_id, found.compose_hash, found.instance_id) == tuple(
        one.hex() for one in said[:3]
    )
    assert (found.device_id, found.os_image_hash) == (said[3].hex(), said[6].hex())
