"""Peers that are Rust meshes, on either side, by how they behave on the wire.

Its server is nginx with a configuration of its own: the whole chain shown, root included, TLS 1.2
allowed, `X-Original-URI` and plain HTTP/1.0 to the auth service. Its client is reqwest: HTTP/1.1 on
a connection that it keeps, the whole chain shown, lower-case fields, the mesh's name as host.
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dstack_mesh.model import TcpAddress
from tests.integration.harness import Answer, Client, Mesh, mesh, problem, request, tcp
from tests.integration.nginx import need_nginx, running_nginx
from tests.integration.tls_peers import VERSIONS, caller_context

SERVER = """\
error_log stderr warn;
pid {directory}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {listen} ssl;
        server_name _;
        ssl_certificate {directory}/server.crt;
        ssl_certificate_key {directory}/server.key;
        ssl_client_certificate {directory}/ca.crt;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_verify_client optional;
        ssl_verify_depth 3;
        location /health {{
            return 200 "OK";
        }}
        location = /auth {{
            internal;
            proxy_pass http://{auth}/auth;
            proxy_pass_request_body off;
            proxy_set_header Content-Length "";
            proxy_set_header X-Original-URI $request_uri;
            proxy_set_header X-Original-Method $request_method;
            proxy_set_header x-client-cert $ssl_client_escaped_cert;
            proxy_set_header x-client-verify $ssl_client_verify;
        }}
        location / {{
            auth_request /auth;
            auth_request_set $app_id $upstream_http_x_dstack_app_id;
            proxy_set_header x-dstack-app-id $app_id;
            proxy_set_header Host $host;
            proxy_pass http://{backend};
        }}
    }}
}}
"""


@contextlib.asynccontextmanager
async def rust_server(directory: Path) -> AsyncIterator[tuple[Mesh, TcpAddress]]:
    """Open a mesh whose `b` is served by such an nginx, with our auth service behind it."""
    need_nginx()
    async with mesh(directory / "w") as one:
        await one.start("a", backend=False)
        backend = await one.start_backend("b")
        sidecar = await one.start(
            "b", backend=False, MESH_INBOUND_MODE="nginx", MESH_AUTH_LISTEN="127.0.0.1:0"
        )
        issued = one.world.kms.issue(one.app_id("b"))
        (directory / "server.crt").write_bytes(b"".join(issued.chain_pem))
        (directory / "server.key").write_bytes(issued.key_pem)
        (directory / "ca.crt").write_bytes(one.world.kms.root_pem)
        address = tcp(one.app("b").env["MESH_INBOUND_LISTEN"])
        auth = sidecar.bound()["auth"]
        config = SERVER.format(directory=directory, listen=address, auth=auth, backend=backend)
        async with running_nginx(config, directory, address):
            yield one, address


async def test_our_client_calls_its_server(tmp_path: Path) -> None:
    async with rust_server(tmp_path) as (one, _):
        for method, body in (("GET", b""), ("POST", b"x" * 100_000)):
            answer = await one.call("a", "b", method, "/echo", [], body)
            assert answer.status == 200, answer
            seen = json.loads(answer.body)
            fields = {name.lower(): value for name, value in seen["headers"]}
            assert (answer.status, fields["x-dstack-app-id"]) == (200, one.app_id("a"))
            assert seen["body_bytes"] == len(body)


async def test_its_nginx_gets_the_statuses_it_knows(tmp_path: Path) -> None:
    async with rust_server(tmp_path) as (one, address):
        root = one.world.kms.root_pem
        async with Client.connect(address, caller_context(root, None)) as stranger:
            await stranger.send(request("GET", "/echo"))
            assert (await stranger.answer()).status == 401
            await stranger.send(request("GET", "/health"))
            assert (await stranger.answer()).status == 200
        assert not one.backends["b"].requests


def reqwest(one: Mesh, version: str) -> ssl.SSLContext:
    """Make the context of a client that shows all of its chain file, the root included."""
    context = caller_context(one.world.kms.root_pem, one.world.kms.issue(one.app_id("a")))
    context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


async def _calls(one: Mesh, version: str) -> list[Answer]:
    name = f"{one.app_id('b')}-443s.{one.world.gateway.base_domain}"
    fields = [
        *(("accept", "*/*"), ("user-agent", "curl/8"), ("x-forwarded-for", "10.0.0.1")),
        ("host", name),
    ]
    answers = []
    async with Client.connect(one.inbound("b"), reqwest(one, version)) as client:
        for _ in range(2):
            await client.send(request("POST", "/echo", fields, b"body"))
            answers.append(await client.answer("POST"))
    return answers


@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_its_client_calls_our_server(tmp_path: Path, version: str) -> None:
    async with mesh(tmp_path) as one:
        await one.start("b", MESH_TLS_MIN_VERSION="1.2")
        for answer in await _calls(one, version):
            assert answer.status == 200
            fields = dict(json.loads(answer.body)["headers"])
            assert fields["x-dstack-app-id"] == one.app_id("a")


async def test_its_client_is_held_to_the_policy(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        await one.start("b", MESH_ALLOWED_APPS="self")
        for answer in await _calls(one, "1.3"):
            problem(answer, "policy_denied", 403)
