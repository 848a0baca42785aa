from __future__ import annotations

import gc
import io
import json
import os
import socket
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from dstack_mesh.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

CERTS = Path(__file__).parent.parent / "vectors" / "certs"
ROOT = str(CERTS / "kms1-root.pem")
LEAF = str(CERTS / "leaf-a.chain.pem")
FORGED = str(CERTS / "leaf-b-under-a-ca.chain.pem")


@pytest.fixture(autouse=True)
def _no_mesh_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without a mesh, whatever this one has."""
    for name in list(os.environ):
        if name.startswith(("MESH_", "DSTACK_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("dstack_mesh.settings.load.AGENT_PATHS", (str(tmp_path / "no.sock"),))


def lines(text: str) -> list[str]:
    return text.splitlines()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str) -> tuple[int, str, str]:
        status = main(["inspect", *args])
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_a_chain_that_holds(run: Any) -> None:
    status, out, err = run(LEAF, "--ca", ROOT)
    assert (status, err) == (0, "")
    assert lines(out)[0] == (
        f"{LEAF} says it is app {'aa' * 20}. Its chain holds by --ca {ROOT}, as a target and as a"
        " caller"
    )
    assert "certificate 3 of 3" in out
    assert f"  app-id              {'aa' * 20}" in lines(out)


def test_a_chain_that_does_not_hold(run: Any) -> None:
    status, out, err = run(FORGED, "--ca", ROOT)
    assert (status, err) == (1, "")
    assert f"says it is app {'bb' * 20}. Its chain does NOT hold by --ca" in lines(out)[0]
    assert lines(out)[0].endswith(f"but the app CA that signed it {'aa' * 20}")


def test_without_a_root_it_is_not_judged(run: Any) -> None:
    status, out, _ = run(FORGED)
    assert status == 0
    assert "Not judged: no root to judge by: give --ca FILE" in lines(out)[0]


def test_json(run: Any) -> None:
    status, out, _ = run(str(CERTS / "leaf-a-clientonly.chain.pem"), "--ca", ROOT, "--json")
    told = json.loads(out)
    assert status == 0
    assert told["app_id"] == "aa" * 20
    assert (told["holds"], told["roles"], told["reason"]) == (True, ["caller"], None)
    assert [link["usage"] for link in told["certificates"]] == ["app:custom", "app:ca", None]


def test_json_of_what_is_not_judged_and_what_does_not_hold(run: Any) -> None:
    told = json.loads(run(LEAF, "--json")[1])
    assert (told["holds"], told["judged_by"]) == (None, None)
    assert told["reason"].startswith("no root to judge by")
    status, out, _ = run(FORGED, "--ca", ROOT, "--json")
    assert status == 1
    assert json.loads(out)["holds"] is False
    assert json.loads(out)["reason"].startswith("chain rule 3")


@pytest.mark.parametrize(("role", "status"), [("caller", 0), ("target", 1)])
def test_one_role_alone(run: Any, role: str, status: int) -> None:
    leaf = str(CERTS / "leaf-a-clientonly.chain.pem")
    assert run(leaf, "--ca", ROOT, "--role", role)[0] == status


def test_a_local_key_provider_is_told_in_those_terms(run: Any) -> None:
    status, out, _ = run(str(CERTS / "leaf-local-provider.chain.pem"), "--ca", ROOT)
    assert status == 1
    assert "names no app" in lines(out)[0]
    assert "a CVM with a local key provider" in lines(out)[1]
    assert "can't be a member of the mesh" in lines(out)[1]


def test_standard_input(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(LEAF).read_bytes())))
    status, out, _ = run("-", "--ca", ROOT)
    assert status == 0
    assert lines(out)[0].startswith("- says it is app")


def test_a_terminal_gets_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["inspect", str(CERTS / "leaf-a-appinfo.chain.pem"), "--ca", ROOT]) == 0
    out = capsys.readouterr().out
    assert "certificate 1 of 3" in out
    assert f"compose hash {'11' * 32}" in out
    assert "│" in out
    assert main(["inspect", str(CERTS / "leaf-local-provider.chain.pem")]) == 0
    assert "local key provider" in capsys.readouterr().out


# What can't be read


def test_the_errors_are_one_line(run: Any, tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x00\xff\x80" * 1000)
    empty = tmp_path / "empty"
    empty.touch()
    large = tmp_path / "large"
    large.write_bytes(b" " * 5_000_000)
    closed = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{closed.getsockname()[1]}"
    closed.close()
    for source, says in {
        str(junk): "it is neither a PEM nor a DER certificate",
        str(empty): "it is empty",
        str(large): "it is larger than 4194304 bytes",
        str(tmp_path): "it cannot be read: Is a directory",
        str(tmp_path / "missing"): "there is no such file; nor is it HOST:PORT",
        "example.org": "there is no such file; nor is it HOST:PORT",
        "a\nb": "'a\\nb': there is no such file",
        "a" * 5000: "it cannot be read: File name too long",
        str(CERTS / "leaf-a.key"): "it holds a private key and no certificate",
        address: "no connection: Connection refused",
    }.items():
        status, out, err = run(source, "--ca", ROOT)
        assert (status, out) == (1, ""), source
        assert len(lines(err)) == 1, err
        assert says in err
        assert err.startswith("dstack-mesh: ")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((LEAF, "--ca", "/nonexistent"), "--ca /nonexistent: there is no such file"),
        ((LEAF, "--ca", str(CERTS / "leaf-a.key")), "it holds a private key and no certificate"),
        ((LEAF, "--ca", LEAF), "it holds 3 certificates; accepted is one, the root"),
        ((LEAF, "--servername", "a.example"), "--servername is for HOST:PORT"),
        ((LEAF, "--role", "both"), "'both' is not one of 'target', 'caller'"),
        ((), "Missing argument"),
        ((LEAF, "-c", "/nonexistent.toml"), "/nonexistent.toml"),
    ],
)
def test_wrong_usage(run: Any, args: tuple[str, ...], says: str) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


# A server


@pytest.fixture
def server() -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(LEAF, CERTS / "leaf-a.key")

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(10)
            with context.wrap_socket(connection, server_side=True) as tls:
                tls.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"localhost:{listener.getsockname()[1]}"
        thread.join(10)


def test_a_server_is_judged_as_a_target(run: Any, server: str) -> None:
    status, out, _ = run(server, "--ca", ROOT, "--servername", "a.example")
    assert status == 0
    assert lines(out)[0].startswith(f"{server} says it is app {'aa' * 20}. Its chain holds")
    assert lines(out)[0].endswith(", as a target")


# The configured identity's root


def test_the_settings_ca_file(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_CERT_FILE", LEAF)
    monkeypatch.setenv("MESH_KEY_FILE", str(CERTS / "leaf-a.key"))
    monkeypatch.setenv("MESH_CA_FILE", ROOT)
    status, out, _ = run(FORGED)
    assert status == 1
    assert f"does NOT hold by env MESH_CA_FILE, {ROOT}: " in lines(out)[0]
    monkeypatch.setenv("MESH_CA_FILE", str(CERTS / "leaf-a.key"))
    status, _, err = run(FORGED)
    assert status == 2
    assert "it holds a private key and no certificate" in err


class Agent:
    """A guest agent that answers everything alike, over TCP or a unix socket."""

    def __init__(self, address: Any, status: int, body: bytes) -> None:
        asked = self.asked = list[tuple[str, bytes]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                asked.append((self.path, self.rfile.read(length)))
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

            def address_string(self) -> str:
                return ""

        class Server(HTTPServer):
            address_family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET

            def server_bind(self) -> None:
                self.socket.bind(self.server_address)
                self.server_address = self.socket.getsockname()

        self._server = Server(address, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


def agents_answer(*names: str) -> bytes:
    chain = [(CERTS / f"{name}.pem").read_text() for name in names]
    return json.dumps({"key": "", "certificate_chain": chain}).encode()


def test_the_guest_agents_root(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = str(tmp_path / "dstack.sock")
    monkeypatch.setenv("DSTACK_AGENT_ADDRESS", f"unix:{path}")
    with Agent(path, 200, agents_answer("leaf-b", "app-b-ca", "kms1-root")) as agent:
        status, out, _ = run(LEAF)
        assert status == 0
        assert f"Its chain holds by the guest agent at unix:{path}, as a target" in lines(out)[0]
        assert run(FORGED)[0] == 1
        asked = [(path, json.loads(body)["subject"]) for path, body in agent.asked]
    assert asked == [("/GetTlsKey", "dstack-mesh inspect")] * 2


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, agents_answer("leaf-local-provider", "kms1-root"), "its chain has 2 certificates"),
        (
            200,
            json.dumps({"key": "k", "certificate_chain": ["a", "b", "c"]}).encode(),
            "it is neither a PEM nor",
        ),
        (200, b'{"key":"k"}', "missing required field `certificate_chain`"),
        (200, b'{"key":"k","certificate_chain": [1]}', "Expected `str`, got `int`"),
        (200, b"nonsense", "JSON is malformed"),
        (400, b'{"error":"no"}', "status 400: no"),
    ],
)
def test_an_agent_that_gives_no_root(
    run: Any, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, says: str
) -> None:
    with Agent(("127.0.0.1", 0), status, body) as agent:
        monkeypatch.setenv("DSTACK_AGENT_ADDRESS", f"http://127.0.0.1:{agent.port}")
        done, out, _ = run(LEAF)
    assert done == 0
    assert f"Not judged: the guest agent at 127.0.0.1:{agent.port} gave no root: " in lines(out)[0]
    assert says in lines(out)[0]
    assert lines(out)[0].endswith("; give --ca FILE")
    assert lines(out)[1] == ""


# The client library leaves the socket of a refused connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_agent_that_is_not_there(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTACK_AGENT_ADDRESS", "unix:/nonexistent/dstack.sock")
    status, out, _ = run(LEAF)
    assert status == 0
    assert "Not judged: the guest agent at unix:/nonexistent/dstack.sock gave no root" in out
    gc.collect()
