"""The load over mutual TLS, as a process, against servers of the test's own."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.credentials import Authority, Files
from bench.mtls import clients
from bench.wrk import FailedRequestsError

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Answers every head on every connection with the same bytes, and counts."""

    def __init__(self, answer: bytes, tls: ssl.SSLContext | None = None) -> None:
        self._answer = answer
        self._tls = tls
        self.heads: list[bytes] = []
        self.subjects: list[object] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self._tls is None:
                self._answer_on(connection)
                return
            with self._tls.wrap_socket(connection, server_side=True) as encrypted:
                self.subjects.append(encrypted.getpeercert())
                self._answer_on(encrypted)

    def _answer_on(self, connection: socket.socket) -> None:
        data = b""
        while piece := connection.recv(65536):
            data += piece
            while b"\r\n\r\n" in data:
                head, _, data = data.partition(b"\r\n\r\n")
                self.heads.append(head)
                connection.sendall(self._answer)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Authority(tmp_path).issue("a")


def server_context(files: Files) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.cert, files.key)
    context.load_verify_locations(files.root)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def test_every_answer_is_counted_once() -> None:
    with (
        Server(ANSWER).running() as server,
        clients(server.address, 3, None, ["x-test: 1"]) as load,
    ):
        done = load.do("ask", seconds=0.1)

    assert done["requests"] == len(server.heads) >= 3
    assert done["seconds"] >= 0.09
    assert {b"x-test: 1" in head for head in server.heads} == {True}


def test_requests_that_vary_do() -> None:
    with Server(ANSWER).running() as server, clients(server.address, 2, None) as load:
        load.do("ask", seconds=0.1, varied=True)

    assert len(set(server.heads)) == len(server.heads) > 2
    assert len({len(head) for head in server.heads}) > 1
    assert {head.count(b"\r\n") for head in server.heads} == {20}


def test_a_certificate_is_shown_and_sessions_are_resumed_only_when_wanted(files: Files) -> None:
    with (
        Server(ANSWER, server_context(files)).running() as server,
        clients(server.address, 0, files) as load,
    ):
        full = load.do("connect", seconds=0.1)
        resumed = load.do("connect", seconds=0.1, resume=True)

    assert None not in server.subjects
    assert full["connections"] > 1
    assert full["resumed"] == 0
    assert resumed["resumed"] == resumed["connections"] - 1


def test_a_fixed_rate_is_kept() -> None:
    with Server(ANSWER).running() as server, clients(server.address, 4, None) as load:
        done = load.do("rate", rate=200, seconds=0.25)

    assert len(done["times"]) == len(server.heads) == 50
    assert min(done["times"]) > 0
    assert done["seconds"] >= 0.24


@pytest.mark.parametrize(
    "answer",
    [ANSWER.replace(b"200 OK", b"502 Bad Gateway"), b"HTTP/1.1 200 OK\r\n\r\n", b"?\r\n\r\n"],
)
def test_any_other_answer_fails_the_run(answer: bytes) -> None:
    with (
        Server(answer).running() as server,
        clients(server.address, 1, None) as load,
        pytest.raises(FailedRequestsError, match="not an answer to count"),
    ):
        load.do("ask", seconds=0.1)


def test_a_server_that_is_not_there_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(FailedRequestsError, match="refused"), clients(address, 1, None):
        pass
