"""What clients and servers say in the tests of this package."""

from __future__ import annotations

import json
from itertools import pairwise

from dstack_mesh.relay.answers import Answer
from dstack_mesh.wire.request_line import RequestLine

GET = b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
UPGRADE_ON = b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
MEBIBYTE = b"x" * (1024 * 1024)


def problem(data: bytes) -> tuple[int, str]:
    """Read an error answer: its status and code."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    said = json.loads(body)
    assert b"x-dstack-mesh-error: " + said["code"].encode() + b"\r\n" in head
    assert head.startswith(b"HTTP/1.1 %d " % said["status"])
    return said["status"], said["code"]


def echo(line: RequestLine) -> Answer:
    return Answer(200, line.method + b" " + line.target, "text/plain")


def bodies(data: bytes) -> list[bytes]:
    """Give the bodies of answers of our own."""
    return [part.partition(b"\r\n\r\n")[2] for part in data.split(b"HTTP/1.1 ")[1:]]


def pieces(data: bytes, where: list[int]) -> list[bytes]:
    edges = [0, *sorted(i % (len(data) + 1) for i in where), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]
