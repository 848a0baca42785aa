"""Nginx mode, end to end: the printed configuration in a real nginx, and every kind of caller."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import ssl
import stat
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import connect

from dstack_mesh.model import AppId
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.kms import ROOT_NAME, Kms
from dstack_mesh.sim.messages import Answer as SimAnswer
from dstack_mesh.sim.messages import Request, Response
from dstack_mesh.sim.odd import Kind, impostor_chain
from tests.integration.harness import Answer, Client, problem, request
from tests.integration.nginx import NGINX, NginxMode, need_nginx, nginx_mode
from tests.integration.processes import COMMAND, clean_environ
from tests.integration.tls_peers import VERSIONS, call_inbound, caller_context, resumes

MIB = 1024 * 1024


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[NginxMode]:
    async with nginx_mode(tmp_path) as one:
        yield one


@contextlib.asynccontextmanager
async def connected(front: NginxMode, issued: Issued | None = None) -> AsyncIterator[Client]:
    """Connect as a good caller of app `a`, or with another chain."""
    async with Client.connect(front.address, front.caller(issued or front.issue())) as client:
        yield client


async def call(
    front: NginxMode,
    issued: Issued | None,
    method: str = "GET",
    path: str = "/echo",
    headers: tuple[tuple[str, str], ...] = (),
) -> Answer:
    return await call_inbound(front.address, front.caller(issued), method, path, headers)


def said(answer: Answer) -> dict[str, list[str]]:
    """Give the header fields that the backend got, as `/echo` tells them."""
    assert answer.status == 200, (answer.headers, answer.body)
    found: dict[str, list[str]] = {}
    for name, value in json.loads(answer.body)["headers"]:
        found.setdefault(name.lower(), []).append(value)
    return found


# Who gets through.


async def test_a_request_through_both_meshes(tmp_path: Path) -> None:
    async with nginx_mode(tmp_path, caller=True) as front:
        answer = await front.mesh.call(
            "a", "b", "PUT", "/echo/../a//b%2fc?d=e&f", [("X-Own", "1"), ("Host", "vpc-server")]
        )
        assert answer.status == 404
        assert answer.get(b"x-backend") == b"b"
        got = front.backend.requests[-1]
        assert (got.method, got.target) == ("PUT", "/echo/../a//b%2fc?d=e&f")
        fields = said(await front.mesh.call("a", "b", "POST", "/echo", [("Host", "V-s:8")], b"x"))
        assert fields["x-dstack-app-id"] == [front.mesh.app_id("a")]
        assert fields["x-forwarded-proto"] == ["https"]
        assert fields["host"] == ["V-s:8"]
        assert fields["content-length"] == ["1"]
        assert not {name for name in fields if name.startswith("x-dstack-target")}
        assert "connection" not in fields


async def test_callers_address_is_appended(front: NginxMode) -> None:
    fields = said(
        await call(
            front,
            front.issue(),
            headers=(("X-Forwarded-For", "1.2.3.4"), ("x-forwarded-for", "5.6.7.8")),
        )
    )
    address = fields["x-real-ip"][0]
    assert address.startswith("127.")
    assert fields["x-forwarded-for"] == [f"1.2.3.4, 5.6.7.8, {address}"]


async def test_without_a_certificate(front: NginxMode) -> None:
    detail = problem(await call(front, None), "client_cert_required", 401)["detail"]
    assert "x-dstack-target-app" in str(detail)
    assert not front.backend.requests


async def test_a_certificate_of_another_kms(front: NginxMode) -> None:
    foreign = Kms.create(b"foreign").issue(front.mesh.app_id("a"))
    answer = await call(front, foreign, headers=(("x-request-id", "mine-1"),))
    fields = problem(answer, "client_cert_untrusted", 401)
    assert fields["request_id"] == "mine-1"
    assert not front.backend.requests


SEEN_BY_NGINX = {
    *(Kind.OTHER_KMS, Kind.SELF_SIGNED, Kind.LEAF_AS_CA, Kind.EXPIRED, Kind.NOT_YET_VALID),
    *(Kind.SUB_CA, Kind.WEAK_KEY, Kind.SERVER_ONLY_EKU),
}
UNSEEN = {
    # nginx hands on no more than the leaf: only the embedded terminator checks the app CA.
    *(Kind.APP_CA_OF_OTHER_APP, Kind.WRONG_CA_USAGE, Kind.CA_WITHOUT_APP_ID),
    Kind.CA_WITHOUT_PATH_LENGTH,
}


async def test_every_kind_of_wrong_caller(front: NginxMode) -> None:
    wrong = set(Kind) - UNSEEN - {Kind.OTHER_APP, Kind.CLIENT_ONLY_EKU}
    kms, a, b = front.mesh.world.kms, front.mesh.app_id("a"), front.mesh.app_id("b")
    for kind in sorted(wrong):
        answer = await call(front, impostor_chain(kms, kind, a, b))
        detail = str(problem(answer, "client_cert_untrusted", 401)["detail"])
        by_nginx = "nginx could not verify" in detail
        assert by_nginx or "chain rule" in detail, (kind, detail)
        assert by_nginx == (kind in SEEN_BY_NGINX), (kind, detail)
        assert not front.backend.requests, kind


async def test_what_only_the_embedded_terminator_sees(front: NginxMode) -> None:
    """The limit that docs/nginx.md states. Where this fails, it is time to change the page."""
    kms, a, b = front.mesh.world.kms, front.mesh.app_id("a"), front.mesh.app_id("b")
    for kind in sorted(UNSEEN):
        answer = await call(front, impostor_chain(kms, kind, a, b))
        assert said(answer)["x-dstack-app-id"] == [a], kind


async def test_a_leaf_of_the_root_itself(front: NginxMode) -> None:
    kms = front.mesh.world.kms
    direct = kms.sign_leaf(ROOT_NAME, kms.root_key, [], (kms.root,))
    answer = await call(front, direct)
    detail = problem(answer, "client_cert_untrusted", 401)["detail"]
    assert "chain rule 1: the leaf's issuer is" in str(detail)


async def test_a_leaf_with_an_attestation_in_it(front: NginxMode) -> None:
    app_id = front.mesh.app_id("a")
    large = front.mesh.world.kms.issue(app_id, attestation=os.urandom(24_000))
    assert said(await call(front, large))["x-dstack-app-id"] == [app_id]


async def test_policy(tmp_path: Path) -> None:
    async with nginx_mode(tmp_path, unix=False, MESH_ALLOWED_APPS="self") as front:
        own = said(await call(front, front.issue("b")))
        assert own["x-dstack-app-id"] == [front.mesh.app_id("b")]
        denied = await call(front, front.issue("a"), headers=(("x-request-id", "r-1"),))
        fields = problem(denied, "policy_denied", 403)
        assert front.mesh.app_id("a") in str(fields["detail"])
        assert fields["request_id"] == "r-1"
        assert len(front.backend.requests) == 1
        text = front.sidecar.metrics.text()
        assert 'dstack_mesh_policy_decisions_total{decision="allow"} 1' in text
        assert 'dstack_mesh_policy_decisions_total{decision="deny"} 1' in text


@pytest.mark.parametrize("name", ["x-dstack-app-id", "x-client-cert", "x-client-verify"])
async def test_what_a_caller_says_of_itself_is_taken_out(front: NginxMode, name: str) -> None:
    spellings = {
        name,
        name.upper(),
        name.title(),
        name.replace("-", "_"),
        name.title().replace("-", "_", 1),
        name.replace("-", "."),
    }
    headers = tuple((spelling, "SUCCESS") for spelling in sorted(spellings)) * 2
    fields = said(await call(front, front.issue(), headers=headers))
    alike = {key: values for key, values in fields.items() if re.sub("[_.]", "-", key) == name}
    right = {"x-dstack-app-id": [front.mesh.app_id("a")]}
    assert alike == (right if name == "x-dstack-app-id" else {})
    # With no certificate of its own a caller has no use for somebody else's.
    problem(await call(front, None, headers=headers), "client_cert_required", 401)


async def test_forwarding_fields_are_set_whatever_was_sent(front: NginxMode) -> None:
    headers = (("x-real-ip", "6.6.6.6"), ("X_Real_Ip", "6.6.6.6"), ("x-forwarded-proto", "http"))
    fields = said(await call(front, front.issue(), headers=headers))
    assert fields["x-forwarded-proto"] == ["https"]
    assert fields["x-real-ip"][0].startswith("127.")
    assert "x_real_ip" not in fields


async def test_our_fields_cannot_be_nominated_away(front: NginxMode) -> None:
    headers = (("Connection", "x-dstack-app-id, x-real-ip"),)
    fields = said(await call(front, front.issue(), headers=headers))
    assert fields["x-dstack-app-id"] == [front.mesh.app_id("a")]
    assert "connection" not in fields


# What a response may say.


async def test_a_backend_cannot_pass_for_the_mesh_or_command_nginx(front: NginxMode) -> None:
    async def answer(_: Request) -> SimAnswer:
        fields = [
            ("x-dstack-mesh-error", "policy_denied"),
            ("x-accel-redirect", "/secret"),
            ("x-accel-buffering", "yes"),
            ("location", "http://dstack_mesh_backend/a"),
            ("server", "app"),
            ("date", "Mon, 01 Jan 2024 00:00:00 GMT"),
        ]
        return Response(403, [*fields, ("content-length", "2")], b"ok")

    front.backend.on("/forge", answer)
    got = await call(front, front.issue(), path="/forge")
    assert (got.status, got.body, got.error) == (403, b"ok", "")
    assert got.get(b"location") == b"http://dstack_mesh_backend/a"
    assert got.all(b"server") == [b"app"]
    assert got.all(b"date") == [b"Mon, 01 Jan 2024 00:00:00 GMT"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 500, 501, 502, 503, 504])
async def test_a_backends_own_errors_pass_as_they_are(front: NginxMode, status: int) -> None:
    answer = await call(front, front.issue(), path=f"/status/{status}")
    assert (answer.status, answer.body) == (status, f"status {status}\n".encode())
    assert answer.get(b"x-backend") == b"b"
    assert answer.error == ""


# Health.


async def test_health_is_open_and_nothing_beside_it(front: NginxMode) -> None:
    for method, path in (("GET", "/health"), ("HEAD", "/health"), ("GET", "/health?x=1")):
        answer = await call(front, None, method, path)
        assert (answer.status, answer.body) == (200, b"" if method == "HEAD" else b"OK\n")
    for method, path in (
        *(("POST", "/health"), ("GET", "/healthz"), ("GET", "/health/"), ("GET", "/Health")),
        *(("GET", "/health/../echo"), ("GET", "/echo?/health"), ("GET", "/x/../health")),
        ("GET", "/.dstack-mesh"),
    ):
        problem(await call(front, None, method, path), "client_cert_required", 401)
    assert not front.backend.requests
    answer = await call(front, front.issue(), "POST", "/health")
    assert answer.get(b"x-backend") == b"b"


async def test_health_too_is_refused_to_a_certificate_that_nginx_cannot_verify(
    front: NginxMode,
) -> None:
    foreign = Kms.create(b"foreign").issue(front.mesh.app_id("a"))
    problem(await call(front, foreign, path="/health"), "client_cert_untrusted", 401)


async def test_what_is_internal_is_not_served(front: NginxMode) -> None:
    for path in ("auth", "bad-request", "untrusted", "uri-too-long", "header-too-large"):
        for issued in (None, front.issue()):
            assert (await call(front, issued, path=f"/.dstack-mesh/{path}")).status == 404
    assert not front.backend.requests


# What nginx refuses by itself.


async def test_what_nginx_refuses_is_a_problem_answer(front: NginxMode) -> None:
    good = front.issue()
    for raw, code, status in (
        (b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", "bad_request", 400),
        (b"GET / HTTP/1.1\r\n\r\n", "bad_request", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "bad_request", 400),
        (b"G@T / HTTP/1.1\r\nHost: a\r\n\r\n", "bad_request", 400),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", "bad_request", 400),
        (request("POST", "/", [("Content-Length", "1, 2")]), "bad_request", 400),
        (request("POST", "/", [("Transfer-Encoding", "gzip")]), "bad_request", 400),
        (request("GET", "/" + "a" * 17_000), "uri_too_long", 414),
        (request("GET", "/", [("a", "b" * 17_000)]), "header_too_large", 431),
    ):
        async with connected(front, good) as client:
            await client.send(raw)
            problem(await client.answer(), code, status)
    async with Client.connect(front.address) as client:
        await client.send(request())
        problem(await client.answer(), "bad_request", 400)
    assert not front.backend.requests


async def test_a_lost_auth_service_lets_nobody_through(front: NginxMode) -> None:
    issued = front.issue()
    assert (await call(front, issued)).status == 200
    await front.sidecar.stop()
    problem(await call(front, issued), "identity_unavailable", 503)
    assert (await call(front, None, path="/health")).status == 200
    assert len(front.backend.requests) == 1


async def test_a_lost_backend(front: NginxMode) -> None:
    await front.backend.aclose()
    problem(await call(front, front.issue()), "connect_failed", 502)


# Bodies, streams, upgrades.


async def test_a_hundred_megabytes_up_and_down_touch_no_disk(front: NginxMode) -> None:
    # nginx makes these at its start, and can write no temporary file without them.
    for name in ("client_body", "proxy"):
        (front.state / name).rmdir()
    piece, count = os.urandom(MIB), 100
    digest = hashlib.sha256()
    async with connected(front) as client:
        head = (
            "POST /upload HTTP/1.1\r\nHost: a\r\n"
            f"Content-Length: {count * MIB}\r\nExpect: 100-continue\r\n\r\n"
        )
        await client.send(head.encode())
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        for _ in range(count):
            digest.update(piece)
            await client.send(piece)
        answer = await client.answer("POST")
        told = json.loads(answer.body)
        assert (told["bytes"], told["sha256"]) == (count * MIB, digest.hexdigest())
    async with connected(front) as client:
        for path in ("/download", "/download-chunked"):
            await client.send(request("GET", f"{path}?bytes={count * MIB}"))
            answer = await client.answer()
            assert (answer.status, len(answer.body)) == (200, count * MIB)
    assert "temporary file" not in front.log.read_text()


async def test_a_chunked_upload_is_carried_while_it_is_sent(front: NginxMode) -> None:
    async with connected(front) as client:
        await client.send(b"POST /mirror HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        for word in (b"first", b"second"):
            await client.send(b"%x\r\n%b\r\n" % (len(word), word))
            assert word in await client.until(word)
        await client.send(b"0\r\n\r\n")
        await client.until(b"0\r\n\r\n")


async def test_events_come_one_by_one(front: NginxMode) -> None:
    more = asyncio.Event()

    async def events(_: Request) -> SimAnswer:
        async def body() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await more.wait()
            yield b"data: 2\n\n"

        return Response(200, [("content-type", "text/event-stream")], body())

    front.backend.on("/sse", events)
    async with connected(front) as client:
        await client.send(request("GET", "/sse"))
        assert b"data: 2" not in await client.until(b"data: 1\n\n")
        more.set()
        await client.until(b"data: 2\n\n")


async def test_head_and_no_content(front: NginxMode) -> None:
    async with connected(front) as client:
        await client.send(request("HEAD", "/download?bytes=5"))
        answer = await client.answer("HEAD")
        assert (answer.status, answer.body, answer.get(b"content-length")) == (200, b"", b"5")
        await client.send(request("GET", "/status/204"))
        assert (await client.answer()).status == 204


async def test_trailers_are_dropped(front: NginxMode) -> None:
    async with connected(front) as client:
        head = [("Transfer-Encoding", "chunked"), ("Trailer", "x-dstack-app-id")]
        await client.send(request("POST", "/echo", head))
        await client.send(b"1\r\na\r\n0\r\nx-dstack-app-id: forged\r\n\r\n")
        answer = await client.answer("POST")
        assert said(answer)["x-dstack-app-id"] == [front.mesh.app_id("a")]
        assert json.loads(answer.body)["trailers"] == []
        await client.send(request("GET", "/download-chunked?bytes=5"))
        assert (await client.answer()).trailers == []


async def test_http_1_0_without_a_host(front: NginxMode) -> None:
    async with connected(front) as client:
        await client.send(b"GET /echo HTTP/1.0\r\n\r\n")
        answer = await client.answer()
        assert said(answer)["host"] == [str(front.sidecar.settings.inbound.backend)]


async def test_a_broken_response_looks_broken(front: NginxMode) -> None:
    async with connected(front) as client:
        await client.send(request("GET", "/cut?bytes=1000"))
        received = await client.closed()
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"Content-Length: 2000" in head.title()
        assert len(body) == 1000


async def test_a_websocket(front: NginxMode) -> None:
    async with connect(
        f"wss://{front.address}/ws", ssl=front.caller(front.issue()), proxy=None, max_size=None
    ) as socket:
        for message in ("hello", os.urandom(3 * MIB)):
            await socket.send(message)
            assert await socket.recv() == message
        await (await socket.ping())
    assert said(await call(front, front.issue()))["x-dstack-app-id"]


async def test_a_websocket_needs_a_certificate(front: NginxMode) -> None:
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        async with connect(f"wss://{front.address}/ws", ssl=front.caller(None), proxy=None):
            pass
    assert refused.value.response.status_code == 401
    assert not front.backend.requests


@pytest.mark.parametrize(
    ("connection", "upgrade", "passed"),
    [
        ("Upgrade", "websocket", "websocket"),
        ("keep-alive, Upgrade", "echo", "echo"),
        ("Upgrade, HTTP2-Settings", "h2c", None),
        ("Upgrade", "H2C", None),
        ("Upgrade", "websocket, h2c", None),
        ("Upgrade", "TLS/1.0", None),
        ("Upgrade", "HTTP/2.0", None),
        ("keep-alive", "websocket", None),
        ("upgraded", "websocket", None),
    ],
)
async def test_what_may_be_upgraded_to(
    front: NginxMode, connection: str, upgrade: str, passed: str | None
) -> None:
    headers = (("Connection", connection), ("Upgrade", upgrade))
    fields = said(await call(front, front.issue(), headers=headers))
    assert fields.get("upgrade") == ([passed] if passed else None)
    assert fields.get("connection") == (["upgrade"] if passed else None)


async def test_connections_are_kept_on_all_three_sides(front: NginxMode) -> None:
    async with connected(front) as client:
        for _ in range(20):
            await client.send(request("GET", "/echo"))
            assert (await client.answer()).status == 200
        assert front.backend.connections == 1
        text = front.sidecar.metrics.text()
        assert 'connections_open{direction="inbound",side="downstream"} 1' in text
        assert 'direction="inbound",method="HEAD",status_class="2xx",code=""} 20' in text


async def test_a_denial_does_not_cost_the_auth_services_connection(front: NginxMode) -> None:
    async with Client.connect(front.address, front.caller(None)) as client:
        for _ in range(5):
            await client.send(request("GET", "/echo"))
            problem(await client.answer(), "client_cert_required", 401)
    text = front.sidecar.metrics.text()
    assert 'connections_open{direction="inbound",side="downstream"} 1' in text


# The configuration itself.


@pytest.mark.parametrize("oldest", VERSIONS)
async def test_old_tls_is_refused_and_no_session_is_resumed(tmp_path: Path, oldest: str) -> None:
    async with nginx_mode(tmp_path, MESH_TLS_MIN_VERSION=oldest) as front:
        issued, root = front.issue(), front.mesh.world.kms.root_pem
        accepted = set()
        for name, version in VERSIONS.items():
            context = caller_context(root, issued, version)
            with contextlib.suppress(ssl.SSLError):
                assert not await asyncio.to_thread(resumes, front.address, context), name
                accepted.add(name)
        assert accepted == {name for name in VERSIONS if name >= oldest}


async def test_files_are_private(front: NginxMode) -> None:
    assert stat.S_IMODE((front.state / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((front.state / "auth.sock").stat().st_mode) == 0o600
    assert "PRIVATE KEY" not in (front.state / "nginx.conf").read_text()


async def test_a_log_without_complaints(front: NginxMode) -> None:
    assert (await call(front, front.issue())).status == 200
    problem(await call(front, None), "client_cert_required", 401)
    assert front.log.read_text() == ""


@pytest.mark.parametrize(
    "more",
    [
        ["--backend", "127.0.0.1:8080"],
        ["--backend", "unix:/run/app/a.sock", "--auth-listen", "unix:/run/mesh/auth.sock"],
        ["--backend", "[::1]:80", "--inbound-listen", "[::]:8443", "--tls-min-version", "1.2"],
        ["--backend", "localhost:80", "--auth-listen", "[::1]:81", "--server-name", "a.b *.c"],
        ["--backend", "localhost:1", "--inbound-listen", "unix:@/tls.sock"],
        ["--backend", "127.0.0.1:1", "--idle-timeout", "0.5", "--response-timeout", "0"],
    ],
    ids=lambda more: " ".join(more),
)
@pytest.mark.parametrize("server", [False, True])
def test_the_command_prints_what_nginx_takes(tmp_path: Path, more: list[str], server: bool) -> None:
    need_nginx()
    issued = Kms.create(b"x").issue(AppId("ab" * 20))
    certificate, key = issued.write(tmp_path)
    (tmp_path / "ca.pem").write_bytes(issued.chain_pem[-1])
    state = tmp_path / "state of nginx"
    state.mkdir()
    flags = [
        *("--cert-file", str(certificate), "--key-file", str(key)),
        *("--ca-file", str(tmp_path / "ca.pem"), "--agent-address", "unix:/a.sock"),
        *("--inbound-mode", "nginx", "--state-dir", str(state)),
        *(word.replace("@", str(tmp_path)) for word in more),
    ]
    ran = _run(*COMMAND, "nginx-config", *flags, *["--server"] * server)
    assert (ran.returncode, ran.stderr) == (0, "")
    around = f"pid '{tmp_path}/pid';\nevents {{}}\nhttp {{\n{ran.stdout}\n}}\n"
    file = tmp_path / "nginx.conf"
    file.write_text(around if server else ran.stdout)
    tested = _run(NGINX, "-t", "-e", "stderr", "-c", str(file))
    assert tested.returncode == 0, tested.stderr
    assert "[warn]" not in tested.stderr


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=clean_environ(), capture_output=True, text=True, timeout=30, check=False
    )
