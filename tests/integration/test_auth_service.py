"""The auth service as nginx meets it: over TCP and a unix socket, from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest

from dstack_mesh.model import Address, TcpAddress, UnixAddress
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.ports import common_port
from tests.integration.harness import Answer, Client, Mesh, eventually, mesh, problem, request, tcp
from tests.integration.nginx import need_nginx, running_nginx
from tests.integration.processes import COMMAND, clean_environ, sidecar_process
from tests.integration.tls_peers import call_inbound, caller_context

FREE = "127.0.0.1:0"


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with mesh(tmp_path) as found:
        yield found


def address_of(one: Mesh) -> Address:
    text = str(one.sidecars["b"].bound()["auth"])
    return UnixAddress(text.removeprefix("unix:")) if text.startswith("unix:") else tcp(text)


@contextlib.asynccontextmanager
async def connected(address: Address) -> AsyncIterator[Client]:
    if isinstance(address, TcpAddress):
        async with Client.connect(address) as client:
            yield client
        return
    reader, writer = await asyncio.open_unix_connection(address.path)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


def question(issued: Issued | None, version: str = "1.1", verify: str = "SUCCESS") -> bytes:
    """Write what nginx asks; without a certificate it sends no field for one."""
    fields = [("Host", "mesh"), ("x-client-verify", verify if issued else "NONE")]
    if issued is not None:
        fields.append(("x-client-cert", quote(issued.leaf_pem, safe="")))
    fields += [("X-Original-URI", "/a?b"), ("X-Original-Method", "GET")]
    return request("GET", "/auth", fields, version=version)


async def checks(one: Mesh, path: str) -> tuple[int, dict[str, dict[str, object]]]:
    async with Client.connect(one.admin("b")) as client:
        await client.send(request("GET", path))
        answer = await client.answer()
    return answer.status, json.loads(answer.body)["checks"]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_every_verdict_over_every_transport(
    one: Mesh, tmp_path: Path, kind: str, version: str
) -> None:
    listen = f"unix:{tmp_path}/auth.sock" if kind == "unix" else FREE
    await one.start(
        "b", MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN=listen, MESH_ALLOWED_APPS="self"
    )
    issue = one.world.kms.issue

    async def ask(data: bytes) -> Answer:
        async with connected(address_of(one)) as client:
            await client.send(data)
            answer = await client.answer()
            assert answer.http_version == b"1.1"
            if version == "1.0":
                assert answer.get(b"connection") == b"close"
                assert await client.closed() == b""
            return answer

    allowed = await ask(question(issue(one.app_id("b")), version))
    assert (allowed.status, allowed.body) == (200, b"")
    assert allowed.get(b"x-dstack-app-id") == one.app_id("b").encode()
    problem(await ask(question(issue(one.app_id("a")), version)), "policy_denied", 403)
    problem(await ask(question(None, version)), "client_cert_required", 401)
    failed = question(issue(one.app_id("b")), version, "FAILED:certificate has expired")
    problem(await ask(failed), "client_cert_untrusted", 401)
    assert (await ask(request("GET", "/health", version=version))).status == 200
    assert one.sidecars["b"].bound()["inbound"] is None


async def test_the_port_of_the_embedded_terminator_stays_free_for_nginx(one: Mesh) -> None:
    await one.start("b", MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN=FREE)
    server = await asyncio.start_server(
        lambda _, writer: writer.close(), *str(one.app("b").env["MESH_INBOUND_LISTEN"]).split(":")
    )
    server.close()


async def test_it_needs_no_backend_and_readiness_says_so(one: Mesh) -> None:
    await one.start("b", backend=False, MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN=FREE)
    async with connected(address_of(one)) as client:
        await client.send(question(one.world.kms.issue(one.app_id("a"))))
        assert (await client.answer()).status == 200
    status, found = await checks(one, "/readyz/inbound")
    assert status == 200
    assert "only nginx knows" in str(found["backend"]["reason"])


async def test_a_backend_that_is_known_is_looked_at(one: Mesh) -> None:
    await one.start("b", MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN=FREE)
    assert (await checks(one, "/readyz/inbound"))[0] == 200
    await one.backends["b"].aclose()
    status, found = await checks(one, "/readyz/inbound")
    assert (status, found["backend"]["ok"]) == (503, False)
    assert (await checks(one, "/readyz"))[0] == 200


async def test_it_opens_with_an_identity(one: Mesh) -> None:
    agent = one.app("b").agent
    await agent.aclose()
    environ = {"MESH_INBOUND_MODE": "nginx", "MESH_AUTH_LISTEN": FREE}
    sidecar = await one.start_closed("b", **one.app("b").env, **environ)
    async with connected(address_of(one)) as client:
        await client.send(question(one.world.kms.issue(one.app_id("a"))))
        answer = asyncio.ensure_future(client.answer())
        await eventually(lambda: sidecar.identity.failed > 0)
        assert (await checks(one, "/readyz"))[0] == 503
        assert not answer.done()
        socket_path = one.app("b").env["DSTACK_AGENT_ADDRESS"].removeprefix("unix:")
        await agent.start(UnixAddress(socket_path))
        await sidecar.wait_open()
        assert (await answer).status == 200


async def test_other_modes_have_no_auth_service(one: Mesh) -> None:
    sidecar = await one.start("b", MESH_AUTH_LISTEN=FREE)
    assert sidecar.bound()["auth"] is None
    assert sidecar.bound()["inbound"] is not None


async def test_a_process_says_where_it_listens_and_drains(one: Mesh, tmp_path: Path) -> None:
    environ = {**one.app("b").env, "MESH_INBOUND_MODE": "nginx", "MESH_AUTH_LISTEN": FREE}
    async with sidecar_process(tmp_path, environ) as process:
        address = process.address("auth")
        said = {line["listener"] for line in process.log if line.get("event") == "listening"}
        assert said == {"outbound", "auth", "admin"}
        async with connected(address) as client:
            await client.send(question(one.world.kms.issue(one.app_id("a"))))
            assert (await client.answer()).status == 200
            process.signal(signal.SIGTERM)
            assert await client.closed() == b""
        assert await process.exit_status() == 0
        with pytest.raises(OSError):
            async with connected(address):
                pass


async def test_after_draining_nobody_is_accepted(one: Mesh) -> None:
    sidecar = await one.start("b", MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN=FREE)
    address = address_of(one)
    async with connected(address) as client:
        await client.send(question(None))
        problem(await client.answer(), "client_cert_required", 401)
        await sidecar.drain()
        assert await client.closed() == b""
    with pytest.raises(ConnectionRefusedError):
        async with connected(address):
            pass


async def test_draining_before_there_was_an_identity_accepts_nobody(one: Mesh) -> None:
    await one.app("b").agent.aclose()
    environ = {"MESH_INBOUND_MODE": "nginx", "MESH_AUTH_LISTEN": FREE}
    sidecar = await one.start_closed("b", **one.app("b").env, **environ)
    address = address_of(one)
    await sidecar.drain()
    with pytest.raises(ConnectionRefusedError):
        async with connected(address):
            pass


@contextlib.asynccontextmanager
async def as_the_rust_mesh_is_called(
    directory: Path, environ: dict[str, str]
) -> AsyncIterator[dict[str, str | None]]:
    """Run `dstack-mesh -c FILE` for the block, from when it is ready; give where it listens."""
    ready, file = directory / "ready.json", directory / "mesh.toml"
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "-c", str(file), "--ready-file", str(ready)),
        env={**clean_environ(), **environ},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(20):
            while not ready.exists():
                assert process.returncode is None
                await asyncio.sleep(0.01)
        yield json.loads(ready.read_text())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_the_rust_meshs_file_and_its_nginx_as_they_are(one: Mesh, tmp_path: Path) -> None:
    """Its TOML opens the same service, and what its users' nginx asks (HTTP/1.0) is understood."""
    need_nginx()
    auth, outbound = common_port(["127.0.0.1"]), common_port(["127.0.0.2"])
    inbound = tcp(one.app("b").env["MESH_INBOUND_LISTEN"])
    issued = one.world.kms.issue(one.app_id("b"))
    issued.write(tmp_path)
    (tmp_path / "ca.pem").write_bytes(one.world.kms.root_pem)
    (tmp_path / "mesh.toml").write_text(
        f"""
        [client]
        enabled = true
        address = "127.0.0.2"
        port = {outbound}
        [auth]
        enabled = true
        address = "127.0.0.1"
        port = {auth}
        [dstack]
        gateway_domain = ""
        [tls]
        cert_file = "{tmp_path}/cert.pem"
        key_file = "{tmp_path}/key.pem"
        ca_file = "{tmp_path}/ca.pem"
        """
    )
    backend = await one.start_backend("b")
    config = f"""
        pid {tmp_path}/nginx.pid;
        events {{ }}
        http {{
            access_log off;
            client_body_temp_path {tmp_path}/body;
            proxy_temp_path {tmp_path}/proxy;
            server {{
                listen {inbound} ssl;
                ssl_certificate {tmp_path}/cert.pem;
                ssl_certificate_key {tmp_path}/key.pem;
                ssl_client_certificate {tmp_path}/ca.pem;
                ssl_verify_client optional;
                ssl_verify_depth 3;
                location / {{
                    auth_request /auth;
                    auth_request_set $app_id $upstream_http_x_dstack_app_id;
                    proxy_set_header X-Dstack-App-Id $app_id;
                    proxy_pass http://{backend};
                }}
                location = /auth {{
                    internal;
                    proxy_set_header x-client-cert $ssl_client_escaped_cert;
                    proxy_set_header x-client-verify $ssl_client_verify;
                    proxy_pass_request_body off;
                    proxy_set_header Content-Length "";
                    proxy_pass http://127.0.0.1:{auth}/auth;
                }}
            }}
        }}
    """
    environ = {
        name: value
        for name, value in one.app("b").env.items()
        if name not in ("MESH_OUTBOUND_LISTEN", "MESH_INBOUND_LISTEN")
    }
    async with (
        as_the_rust_mesh_is_called(tmp_path, {**environ, "MESH_BACKEND": ""}) as bound,
        running_nginx(config, tmp_path, inbound),
    ):
        assert bound["outbound"] == f"127.0.0.2:{outbound}"
        assert (bound["inbound"], bound["auth"]) == (None, f"127.0.0.1:{auth}")
        root = one.world.kms.root_pem
        good = caller_context(root, one.world.kms.issue(one.app_id("a")))
        for method, path in (("GET", "/echo"), ("POST", "/echo?a=b")):
            answer = await call_inbound(
                inbound, good, method, path, (("x-dstack-app-id", "forged"), ("cookie", "a=b"))
            )
            headers = json.loads(answer.body)["headers"]
            found = [value for name, value in headers if name.lower() == "x-dstack-app-id"]
            assert found == [one.app_id("a")]
        assert (await call_inbound(inbound, caller_context(root))).status == 401
