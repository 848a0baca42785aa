"""The certificate that nginx hands on in a header: a PEM text, percent-encoded. Pure.

What is read is what nginx writes for `$ssl_client_escaped_cert` and nothing wider: RFC 3986 2.1
around RFC 7468's strict form (section 3, `stricttextualmsg`), with one certificate in it. These
bytes decide who a caller is, so whatever does not fit is an error, never "absent".
"""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

MAX_ESCAPED_BYTES = 64 * 1024
"""As much as a whole head may have; a leaf with an attestation in it takes half of that."""

_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
_WHITE_SPACE = b" \t\r\n"
_LINE_CHARACTERS = 64

# Possessive: a hostile value must not make the matcher backtrack.
_escaped_part = re.compile(rb"(?:[A-Za-z0-9\-._~]|%[0-9A-Fa-f]{2})*").match
_base64_lines = re.compile(
    rb"\r?\n(?:[A-Za-z0-9+/]{64}\r?\n)*(?:[A-Za-z0-9+/=]{1,64}\r?\n)?"
).fullmatch

_SEQUENCE = 0x30
_LONG_FORM = 0x80


class EscapedPemError(ValueError):
    """A value is not one percent-encoded certificate; the message says why, without the value."""


def parse_escaped_pem(value: bytes) -> bytes:
    """Give the DER of the one certificate in `value`. Raises only `EscapedPemError`.

    The result is one ASN.1 SEQUENCE from its first byte to its last; what is inside is not looked
    at.
    """
    der = _decode(_body(_unescape(value)))
    if not _is_one_sequence(der):
        raise EscapedPemError("the certificate's bytes are not exactly one DER SEQUENCE")
    return der


def _unescape(value: bytes) -> bytes:
    if not value:
        raise EscapedPemError("it is empty")
    if len(value) > MAX_ESCAPED_BYTES:
        raise EscapedPemError(f"it has {len(value)} bytes; at most {MAX_ESCAPED_BYTES} are read")
    good = _escaped_part(value)
    end = good.end() if good is not None else 0
    if end < len(value):
        raise EscapedPemError(f"it is not percent-encoded at byte {end} (RFC 3986 2.1)")
    return unquote_to_bytes(value)


def _body(pem: bytes) -> bytes:
    """Give what stands between the two boundaries, line ends included."""
    text = pem.strip(_WHITE_SPACE)
    if not text.startswith(_BEGIN):
        raise EscapedPemError(f"it does not begin with {_BEGIN.decode()}")
    body, end, rest = text.removeprefix(_BEGIN).partition(_END)
    if not end:
        raise EscapedPemError(f"it has no {_END.decode()}")
    if rest:
        raise EscapedPemError(f"there is more than white space behind {_END.decode()}")
    return body


def _decode(body: bytes) -> bytes:
    if _base64_lines(body) is None:
        raise EscapedPemError(
            f"it is not base64 in lines of {_LINE_CHARACTERS} characters (RFC 7468 3)"
        )
    text = body.translate(None, b"\r\n")
    try:
        der = binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise EscapedPemError(f"its base64 is broken: {error}") from None
    # Padding too much, or bits set behind the content, would give one certificate two texts.
    if binascii.b2a_base64(der, newline=False) != text:
        raise EscapedPemError("its base64 is not in the canonical form (RFC 4648 3.5)")
    return der


def _is_one_sequence(der: bytes) -> bool:
    """Tell whether `der` is a SEQUENCE with the shortest length (X.690 10.1), and nothing more."""
    if len(der) < 2 or der[0] != _SEQUENCE:
        return False
    size = der[1]
    if size < _LONG_FORM:
        return len(der) == 2 + size
    octets = size - _LONG_FORM
    length = int.from_bytes(der[2 : 2 + octets])
    shortest = (length.bit_length() + 7) // 8
    return length >= _LONG_FORM and octets == shortest and len(der) == 2 + octets + length
