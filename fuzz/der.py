"""A second reader and writer of DER (X.690), so that certificates are not judged by their judge."""

from __future__ import annotations

OCTET_STRING, BIT_STRING, OID, BOOLEAN = 0x04, 0x03, 0x06, 0x01
SEQUENCE, EXTENSIONS = 0x30, 0xA3


def encode(tag: int, *contents: bytes) -> bytes:
    """Encode one element with a definite length in its shortest form."""
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    octets = size.to_bytes(4).lstrip(b"\0")
    return bytes((tag, 0x80 | len(octets))) + octets + content


def element(data: bytes) -> tuple[int, bytes, bytes]:
    """Give tag and content of the element at the front, and what follows. Raises ValueError."""
    if len(data) < 2:
        raise ValueError("no element")
    tag, size = data[0], data[1]
    start = 2
    if size & 0x80:
        count = size & 0x7F
        octets = data[2 : 2 + count]
        size = int.from_bytes(octets)
        if not 1 <= count <= 4 or len(octets) != count or octets[0] == 0 or size < 0x80:
            raise ValueError("not the shortest definite length")
        start += count
    if len(data) < start + size:
        raise ValueError("cut off")
    return tag, data[start : start + size], data[start + size :]


def elements(content: bytes) -> list[tuple[int, bytes]]:
    """Give tag and content of all elements that fill `content`. Raises ValueError."""
    found = []
    while content:
        tag, inner, content = element(content)
        found.append((tag, inner))
    return found


def only(data: bytes, tag: int) -> bytes:
    """Give the content of the one element of this tag that fills `data`. Raises ValueError."""
    found, content, rest = element(data)
    if found != tag or rest:
        raise ValueError(f"not one element of tag {tag:#x}")
    return content


def signed_part(certificate: bytes) -> bytes:
    """Give a certificate's TBSCertificate as it is signed. Raises ValueError."""
    content = only(certificate, SEQUENCE)
    return content[: len(content) - len(element(content)[2])]


def extensions(certificate: bytes) -> list[tuple[bytes, bytes]]:
    """Give OID (encoded) and value of each extension, in order. Raises ValueError."""
    fields = elements(only(signed_part(certificate), SEQUENCE))
    found = []
    for block in (content for tag, content in fields if tag == EXTENSIONS):
        for _, one in elements(only(block, SEQUENCE)):
            parts = elements(one)
            found.append((parts[0][1], parts[-1][1]))
    return found


def with_extensions(certificate: bytes, block: bytes) -> bytes:
    """Give the certificate with other extensions; its signature does not fit any more."""
    outer = elements(only(certificate, SEQUENCE))
    fields = [(tag, content) for tag, content in elements(outer[0][1]) if tag != EXTENSIONS]
    inner = [encode(tag, content) for tag, content in fields]
    tbs = encode(SEQUENCE, *inner, encode(EXTENSIONS, encode(SEQUENCE, block)))
    return encode(SEQUENCE, tbs, *(encode(tag, content) for tag, content in outer[1:]))
