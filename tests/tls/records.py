"""TLS records and handshake messages written by hand (RFC 8446 4 and 5, RFC 5246), right or wrong.

No library writes what a test here has to send: a length that lies, a message that is missing, a
signature by the wrong key.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from dstack_mesh.model import TcpAddress

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
CLIENT_HELLO, SERVER_HELLO, NEW_SESSION_TICKET, ENCRYPTED_EXTENSIONS = 1, 2, 4, 8
CERTIFICATE, SERVER_KEY_EXCHANGE, CERTIFICATE_REQUEST, SERVER_HELLO_DONE = 11, 12, 13, 14
CERTIFICATE_VERIFY, CLIENT_KEY_EXCHANGE, FINISHED, KEY_UPDATE = 15, 16, 20, 24
HELLO_REQUEST = 0

SERVER_NAME, GROUPS, POINT_FORMATS, SIGNATURES, ALPN = 0, 10, 11, 13, 16
SESSION_TICKET, PRE_SHARED_KEY, EARLY_DATA, VERSIONS = 35, 41, 42, 43
PSK_MODES, KEY_SHARE, RENEGOTIATION_INFO = 45, 51, 0xFF01

TLS_1_0, TLS_1_1, TLS_1_2, TLS_1_3 = 0x0301, 0x0302, 0x0303, 0x0304
SSL_3 = 0x0300
AES_128_GCM_SHA256 = 0x1301
ECDHE_ECDSA_AES_128_GCM_SHA256 = 0xC02B
X25519, SECP256R1 = 0x001D, 0x0017
ECDSA_P256_SHA256 = 0x0403

MAX_PLAINTEXT = 1 << 14
DEADLINE = 20.0


def vector(size: int, content: bytes) -> bytes:
    """Put a length of `size` bytes before `content`."""
    return len(content).to_bytes(size) + content


def u16s(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(2) for number in numbers)


def numbers_of(text: str) -> list[int]:
    """Read numbers that are written as registries write them, in hex."""
    return [int(one, 16) for one in text.split()]


def record(kind: int, content: bytes, version: int = TLS_1_2) -> bytes:
    return bytes([kind]) + version.to_bytes(2) + vector(2, content)


def message(kind: int, body: bytes) -> bytes:
    return bytes([kind]) + vector(3, body)


def in_records(kind: int, content: bytes, size: int = MAX_PLAINTEXT) -> bytes:
    """Write `content` as records of at most `size` bytes each."""
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    return b"".join(record(kind, piece) for piece in pieces)


def extension(kind: int, body: bytes) -> bytes:
    return u16s(kind) + vector(2, body)


@dataclass
class Hello:
    """A ClientHello (RFC 8446 4.1.2); every part of it may be replaced."""

    version: int = TLS_1_2
    random: bytes = field(default_factory=lambda: os.urandom(32))
    session_id: bytes = b""
    suites: tuple[int, ...] = (AES_128_GCM_SHA256, ECDHE_ECDSA_AES_128_GCM_SHA256)
    compressions: bytes = b"\0"
    extensions: list[bytes] = field(default_factory=list)

    def body(self) -> bytes:
        head = self.version.to_bytes(2) + self.random + vector(1, self.session_id)
        offers = vector(2, u16s(*self.suites)) + vector(1, self.compressions)
        return head + offers + vector(2, b"".join(self.extensions))

    def message(self) -> bytes:
        return message(CLIENT_HELLO, self.body())

    def record(self) -> bytes:
        return in_records(HANDSHAKE, self.message())


def server_name(name: bytes) -> bytes:
    return extension(SERVER_NAME, vector(2, b"\0" + vector(2, name)))


def usual_extensions(
    *,
    versions: tuple[int, ...] = (TLS_1_3,),
    groups: tuple[int, ...] = (X25519, SECP256R1),
    signatures: tuple[int, ...] = (ECDSA_P256_SHA256, 0x0804),
    share: bytes | None = None,
) -> list[bytes]:
    """Give the extensions that a handshake needs; without `share` the server has to ask for it."""
    shares = b"" if share is None else u16s(X25519) + vector(2, share)
    found = [
        extension(GROUPS, vector(2, u16s(*groups))),
        extension(SIGNATURES, vector(2, u16s(*signatures))),
    ]
    if TLS_1_3 in versions:
        found.append(extension(VERSIONS, vector(1, u16s(*versions))))
        found.append(extension(KEY_SHARE, vector(2, shares)))
    return found


class Reader:
    """Takes the parts of a message in turn; raises `ValueError` where one is not whole."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, size: int) -> bytes:
        if len(self.rest) < size:
            raise ValueError(f"{size} bytes wanted, {len(self.rest)} there")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))

    def numbers(self) -> list[int]:
        """Take all that is left, as numbers of two bytes."""
        found = []
        while self.rest:
            found.append(self.number(2))
        return found


def read_extensions(block: bytes) -> dict[int, bytes]:
    reader, found = Reader(block), dict[int, bytes]()
    while reader.rest:
        kind = reader.number(2)
        assert kind not in found, f"extension {kind} twice"
        found[kind] = reader.vector(2)
    return found


def read_hello(body: bytes) -> Hello:
    """Read a ClientHello, strictly."""
    reader = Reader(body)
    hello = Hello(reader.number(2), reader.take(32), reader.vector(1))
    hello.suites = tuple(Reader(reader.vector(2)).numbers())
    hello.compressions = reader.vector(1)
    hello.extensions = [
        extension(kind, value) for kind, value in read_extensions(reader.vector(2)).items()
    ]
    assert not reader.rest
    return hello


def split_records(data: bytes) -> list[tuple[int, bytes]]:
    """Split whole records; raises `ValueError` for anything that is not TLS."""
    reader, found = Reader(data), []
    while reader.rest:
        kind = reader.number(1)
        if kind not in (CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA):
            raise ValueError(f"not a TLS record: {data[:40]!r}")
        if reader.number(2) not in (SSL_3, TLS_1_0, TLS_1_1, TLS_1_2):
            raise ValueError(f"no version of TLS: {data[:40]!r}")
        found.append((kind, reader.vector(2)))
    return found


def handshake_messages(data: bytes) -> list[tuple[int, bytes]]:
    """Give the handshake messages that are there in the clear, with their kinds."""
    clear = b"".join(content for kind, content in split_records(data) if kind == HANDSHAKE)
    reader, found = Reader(clear), []
    while reader.rest:
        found.append((reader.number(1), reader.vector(3)))
    return found


def alerts(data: bytes) -> list[int]:
    """Give the codes of the alerts that are there in the clear."""
    found = [content for kind, content in split_records(data) if kind == ALERT]
    assert all(len(content) == 2 for content in found)
    return [content[1] for content in found]


class Channel(Protocol):
    """The way to the other side, blocking."""

    def send(self, data: bytes) -> None: ...

    def receive(self) -> bytes:
        """Give what comes next; nothing at the end."""
        ...


class SocketChannel:
    """A TCP connection. Raises `TimeoutError` where nothing comes at all."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE)
        self.sock = sock

    @classmethod
    @contextlib.contextmanager
    def to(cls, address: TcpAddress) -> Iterator[SocketChannel]:
        with socket.create_connection((address.host, address.port), timeout=DEADLINE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield cls(sock)

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # what the other side said is still to be read
            self.sock.sendall(data)

    def receive(self) -> bytes:
        try:
            return self.sock.recv(1 << 16)
        except ConnectionError:
            return b""

    def finish(self) -> None:
        """Say that nothing more comes."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def to_end(self) -> bytes:
        data = b""
        while piece := self.receive():
            data += piece
        return data


class MemoryChannel:
    """An `ssl` object of ours, driven without a socket. `failure` is what ended its handshake."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ours = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self.failure: ssl.SSLError | None = None
        self.done = False
        self._step()

    def send(self, data: bytes) -> None:
        self._incoming.write(data)
        self._step()

    def receive(self) -> bytes:
        return self._outgoing.read()

    def _step(self) -> None:
        if self.done or self.failure is not None:
            return
        try:
            self.ours.do_handshake()
            self.done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.failure = error
