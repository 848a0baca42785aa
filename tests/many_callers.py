"""Callers in a process of their own: `python -m tests.many_callers ADDRESS COUNT PEM TARGET`.

For each line read they open COUNT connections, do what the line says on each, close them all, and
write `done`. With PEM, a key and its chain, they speak TLS where the line is for inbound.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import sys
from collections.abc import Iterator

_RESET = struct.pack("ii", 1, 0)


def main(address: str, count: str, pem: str, target: str) -> None:
    host, _, port = address.rpartition(":")
    where = (host, int(port))
    inbound = host != "127.0.0.1"
    for line in sys.stdin:
        what = line.strip()
        tls = inbound and what not in ("silent", "nonsense")
        context = _context(what, pem) if tls else None
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(_open(where, context)) for _ in range(int(count))]
            for sock in held:
                _act(sock, what, target, inbound)
            if what == "reset":
                for sock in held:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        print("done", flush=True)  # noqa: T201 - for the process that started this one


def _context(what: str, pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if what != "no certificate":
        context.load_cert_chain(pem)
    return context


@contextlib.contextmanager
def _open(where: tuple[str, int], context: ssl.SSLContext | None) -> Iterator[socket.socket]:
    with socket.create_connection(where, timeout=20) as sock:
        # A server without session tickets answers no handshake's end, so Nagle would wait here.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is None:
            yield sock
            return
        with context.wrap_socket(sock) as wrapped:
            yield wrapped


def _act(sock: socket.socket, what: str, target: str, inbound: bool) -> None:
    if what in ("no request", "silent"):
        return
    if what == "nonsense":
        sock.sendall(b"\x00nonsense\r\n\r\n")
        while sock.recv(65536):
            pass
        return
    goes_to = b"" if inbound else b"x-dstack-target-app: %b\r\n" % target.encode()
    head = b"GET / HTTP/1.1\r\nHost: a\r\n%b\r\n" % goes_to
    if what == "upgrade":
        key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n%b\r\n" % key
        head = head.replace(b"GET / ", b"GET /ws ").removesuffix(b"\r\n") + upgrade
    sock.sendall(head)
    answer = sock.recv(65536)
    expected = {"upgrade": b" 101 ", "no certificate": b" 401 "}.get(what, b" 200 ")
    assert expected in answer, answer


if __name__ == "__main__":
    main(*sys.argv[1:])
