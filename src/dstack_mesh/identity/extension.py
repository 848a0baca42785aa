"""Reads what dstack's KMS writes into certificates: app-id, usage, app info.

Each extension's value is a DER OCTET STRING around its content (X.690 8.7 and 10.1). Whatever is
there and cannot be read is an error, never "absent": these bytes decide who a peer is.
"""

from __future__ import annotations

from typing import cast

import msgspec
from cryptography import x509

from dstack_mesh.model import AppId, AppInfo

OID_TDX_QUOTE = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.1")
OID_EVENT_LOG = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.2")
OID_APP_ID = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.3")
OID_USAGE = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.4")
OID_ATTESTATION = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.8")
OID_APP_INFO = x509.ObjectIdentifier("1.3.6.1.4.1.62397.1.9")

USAGE_LEAF = "app:custom"
USAGE_APP_CA = "app:ca"

APP_ID_BYTES = 20

_NAMES = {OID_APP_ID: "app-id", OID_USAGE: "usage", OID_APP_INFO: "app info"}
_OCTET_STRING = 0x04
_LONG_FORM = 0x80
_SHOWN_BYTES = 32


class ExtensionError(ValueError):
    """An extension is not what dstack's KMS writes; the message says what was found instead."""


class ExtensionMissingError(ExtensionError):
    """The certificate does not carry the extension at all."""


class _WireAppInfo(msgspec.Struct, array_like=True, frozen=True):
    """App info as the KMS encodes it, in this order; later KMS versions append elements."""

    app_id: bytes
    compose_hash: bytes
    instance_id: bytes
    device_id: bytes
    mr_system: bytes
    mr_aggregated: bytes
    os_image_hash: bytes
    key_provider_info: bytes


_app_info_decoder = msgspec.msgpack.Decoder(_WireAppInfo)


def app_id(cert: x509.Certificate) -> AppId:
    """Return the certificate's app-id as 40 lower-case hex digits.

    Raises `ExtensionMissingError` when there is none, and `ExtensionError` when it is there twice,
    is not exactly `04 14` and 20 bytes, or the certificate's extensions cannot be parsed.
    """
    value = _value(cert, OID_APP_ID)
    if value is None:
        raise ExtensionMissingError(f"no app-id extension ({OID_APP_ID.dotted_string})")
    content = _content(value, OID_APP_ID)
    if len(content) != APP_ID_BYTES:
        raise ExtensionError(
            f"the app-id extension holds {len(content)} bytes, expected {APP_ID_BYTES}"
        )
    return AppId(content.hex())


def usage(cert: x509.Certificate) -> str | None:
    """Return the certificate's usage text, such as `app:custom`, or None when there is none.

    Raises `ExtensionError` when it is there twice, is not an OCTET STRING or is not UTF-8.
    """
    value = _value(cert, OID_USAGE)
    if value is None:
        return None
    content = _content(value, OID_USAGE)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ExtensionError(f"the usage extension is not UTF-8 text: {_shown(content)}") from None


def app_info(cert: x509.Certificate) -> AppInfo | None:
    """Return what the KMS wrote about the leaf's CVM, or None when there is no such extension.

    Raises `ExtensionError` when it is there twice or is not the MessagePack array of byte strings
    (at least the eight that dstack defines, the first a 20-byte app-id) and nothing after it.
    """
    value = _value(cert, OID_APP_INFO)
    if value is None:
        return None
    try:
        wire = _app_info_decoder.decode(_content(value, OID_APP_INFO))
    except msgspec.MsgspecError as exc:
        raise ExtensionError(
            f"the app info extension is not dstack's MessagePack array: {exc}"
        ) from None
    if len(wire.app_id) != APP_ID_BYTES:
        raise ExtensionError(
            f"the app info extension names an app-id of {len(wire.app_id)} bytes, "
            f"expected {APP_ID_BYTES}"
        )
    return AppInfo(
        app_id=AppId(wire.app_id.hex()),
        compose_hash=wire.compose_hash.hex(),
        instance_id=wire.instance_id.hex(),
        device_id=wire.device_id.hex(),
        os_image_hash=wire.os_image_hash.hex(),
    )


def extensions(cert: x509.Certificate) -> x509.Extensions:
    """Return the certificate's extensions; raises `ExtensionError` when they cannot be parsed.

    A repeated extension is an error too (RFC 5280 4.2: at most one of each).
    """
    try:
        return cert.extensions
    except x509.DuplicateExtension as exc:
        name = _NAMES.get(exc.oid, "same")
        raise ExtensionError(
            f"the {name} extension ({exc.oid.dotted_string}) is there more than once"
        ) from None
    except Exception as exc:  # what cannot be parsed is refused, whatever the parser raises
        raise ExtensionError(f"its extensions cannot be parsed: {exc}") from exc


def octet_string(content: bytes) -> bytes:
    """Return `content` as a DER OCTET STRING, the form of every dstack extension's value.

    DER has one encoding for each content (X.690 10.1), so comparing with it is a strict parse.
    """
    length = len(content)
    if length < _LONG_FORM:
        return bytes((_OCTET_STRING, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes((_OCTET_STRING, _LONG_FORM | len(octets))) + octets + content


def _value(cert: x509.Certificate, oid: x509.ObjectIdentifier) -> bytes | None:
    for extension in extensions(cert):
        if extension.oid == oid:
            # The library hands on the undecoded bytes of an OID that it does not know.
            return cast("x509.UnrecognizedExtension", extension.value).value
    return None


def _content(value: bytes, oid: x509.ObjectIdentifier) -> bytes:
    """Return the content of the DER OCTET STRING that fills `value` exactly."""
    for header_size in range(2, 6):
        content = value[header_size:]
        if octet_string(content) == value:
            return content
    raise ExtensionError(
        f"the {_NAMES[oid]} extension's value is not exactly one DER OCTET STRING: {_shown(value)}"
    )


def _shown(value: bytes) -> str:
    """Return some bytes of a peer as hex, cut so that an error stays readable."""
    if len(value) <= _SHOWN_BYTES:
        return value.hex() or "(empty)"
    return f"{value[:_SHOWN_BYTES].hex()}… ({len(value)} bytes)"
