"""Inputs of the whole-proxy targets: a little play of what clients and servers do.

An input is scenes, each behind a byte 0xff: a byte that says what happens and to whom, and the
bytes that are sent. In these some bytes stand for more: 0xfe for the sender's mark (below), others
for pieces of HTTP (`MACROS`).

A mark is `~` and a letter, one for each client; a server puts into an answer the marks of the
request that it answers. `~` itself is taken out of what is sent, so that a mark is where it belongs
or was brought where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from tests.memory_mesh import OTHER, TARGET_LINE

from fuzz.reader import Message

MARK = b"\xfe"
_LETTERS = b"XYZ"  # none with which something begins that the mesh puts behind what it passes on
_mark = re.compile(rb"~([XYZ])").findall

MACROS = {
    0xFD: TARGET_LINE,
    0xFC: b"GET / HTTP/1.1\r\nHost: a\r\n",
    0xFB: b"\r\n\r\n",
    0xFA: b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n",
    0xF9: b"Transfer-Encoding: chunked\r\n",
    0xF8: b"x-dstack-target-app: %b\r\n" % OTHER.encode(),
    0xF7: b"POST / HTTP/1.1\r\nHost: a\r\n",
    0xF6: b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    0xF5: b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    0xF4: b"0\r\n\r\n",
}
_MACRO = re.compile(b"[%b]" % b"".join(re.escape(bytes((one,))) for one in MACROS))


class What(IntEnum):
    """What happens in a scene: the low four bits of its first byte."""

    CLIENT_SENDS = 0
    SERVER_SENDS = 1
    VERIFY = 2
    ACCEPT = 3
    CLIENT_ENDS = 4
    SERVER_ENDS = 5
    CLIENT_BREAKS = 6
    SERVER_BREAKS = 7
    CLIENT_STALLS = 8
    SERVER_STALLS = 9
    CLIENT_FLOWS = 10
    SERVER_FLOWS = 11
    TIME = 12
    RENEWAL = 13
    REFUSE = 14
    TOGETHER = 15


@dataclass(frozen=True)
class Scene:
    """One thing that happens."""

    what: What
    who: int
    """0 to 15: which client, which server, which way."""
    sent: bytes


def scenes(data: bytes, most: int) -> Iterator[Scene]:
    """Give the scenes of an input."""
    for part in data.split(b"\xff", most + 1)[1 : most + 1]:
        first = part[0] if part else 0
        yield Scene(What(first & 15), first >> 4, part[1:])


def scene(what: What, who: int = 0, sent: bytes = b"") -> bytes:
    """Write a scene, for seeds."""
    return bytes((0xFF, who << 4 | what)) + sent


def spelt_out(sent: bytes, marks: bytes) -> bytes:
    """Give the bytes that `sent` stands for."""
    text = _MACRO.sub(lambda found: MACROS[found[0][0]], sent.replace(b"~", b""))
    return text.replace(MARK, marks)


def mark_of(client: int) -> bytes:
    """Give a client's mark."""
    return b"~" + _LETTERS[client : client + 1]


def marks_in(message: Message) -> bytes:
    """Give the marks in a message, each once."""
    parts = [*message.first, message.body, *(v for f in message.fields for v in f)]
    parts += [v for f in message.trailers for v in f]
    return b"".join(b"~" + letter for letter in sorted(set(_mark(b"\n".join(parts)))))


def marks(data: bytes) -> set[bytes]:
    """Give all marks in bytes."""
    return {b"~" + letter for letter in _mark(data)}
