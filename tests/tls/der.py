"""DER by position (X.690 8.1), for certificates that no library builds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

EXTENSIONS = 0xA3
ECDSA_SHA_1 = bytes.fromhex("300906072a8648ce3d0401")


@dataclass(frozen=True)
class Element:
    """Where an element is: its tag at `start`, its content from `content` to `end`."""

    tag: int
    start: int
    content: int
    end: int


def element(data: bytes, at: int = 0) -> Element:
    size, content = data[at + 1], at + 2
    if size & 0x80:
        content += size & 0x7F
        size = int.from_bytes(data[at + 2 : content])
    return Element(data[at], at, content, content + size)


def children(data: bytes, of: Element) -> Iterator[Element]:
    at = of.content
    while at < of.end:
        child = element(data, at)
        yield child
        at = child.end


def wrap(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def tbs_of(certificate: bytes) -> bytes:
    """Give what is signed of a certificate."""
    tbs = next(children(certificate, element(certificate)))
    return certificate[tbs.start : tbs.end]


def extensions_of(tbs: bytes) -> Element:
    """Find the extensions, with their tag, in what is signed."""
    return next(one for one in children(tbs, element(tbs)) if one.tag == EXTENSIONS)


def sign(
    tbs: bytes, key: ec.EllipticCurvePrivateKey, digest: hashes.HashAlgorithm | None = None
) -> bytes:
    """Make a certificate of `tbs`, whose own algorithm has to be the one signed with."""
    # After version and serial number; what is behind it may be anything.
    algorithm = next(islice(children(tbs, element(tbs)), 2, None))
    signature = key.sign(tbs, ec.ECDSA(digest or hashes.SHA256()))
    said = tbs[algorithm.start : algorithm.end]
    return wrap(0x30, tbs + said + wrap(0x03, b"\0" + signature))


def with_algorithm(tbs: bytes, algorithm: bytes) -> bytes:
    """Give `tbs` with another signature algorithm said in it."""
    parts = list(children(tbs, element(tbs)))
    content = tbs[parts[0].start : parts[2].start] + algorithm + tbs[parts[2].end : parts[-1].end]
    return wrap(0x30, content)
