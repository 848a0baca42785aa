"""The whole simulated world, used as a sidecar would use it."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest

from dstack_mesh.model import AppId
from dstack_mesh.sim.certificates import Issued
from dstack_mesh.sim.http import HttpServer
from dstack_mesh.sim.messages import Answer, Request, Response
from dstack_mesh.sim.world import (
    BadWorldError,
    SimApp,
    World,
    WorldError,
    app_id_of,
    instance_id_of,
    parse_app,
    parse_listen,
)

VARIABLES = [
    "DSTACK_AGENT_ADDRESS",
    "MESH_SYS_CONFIG",
    "MESH_GATEWAY_CONNECT",
    "MESH_INBOUND_LISTEN",
    "MESH_OUTBOUND_LISTEN",
    "MESH_DEFAULT_PORT",
    "MESH_ADMIN_LISTEN",
]


async def tls_key(app: SimApp) -> Issued:
    path = app.env["DSTACK_AGENT_ADDRESS"].removeprefix("unix:")
    transport = httpx2.AsyncHTTPTransport(uds=path)
    async with httpx2.AsyncClient(transport=transport) as client:
        answer = await client.get(
            "http://agent/GetTlsKey?usage_server_auth=true&usage_client_auth=true"
        )
    fields = answer.json()
    chain = tuple(pem.encode() for pem in fields["certificate_chain"])
    return Issued(fields["key"].encode(), chain)


async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


def open_files() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def context(issued: Issued, protocol: int) -> ssl.SSLContext:
    found = ssl.SSLContext(protocol)
    found.check_hostname = False
    found.verify_mode = ssl.CERT_REQUIRED
    found.load_verify_locations(cadata=issued.chain_pem[-1].decode())
    issued.load_into(found)
    return found


async def test_two_apps_talk_over_mutual_tls_with_nothing_but_their_environments() -> None:
    async def serve(_: Request) -> Answer:
        return Response(200, [], b"from b")

    async with World(["a", "b"]) as world:
        a, b = world.apps["a"], world.apps["b"]
        host, _, port = b.env["MESH_INBOUND_LISTEN"].rpartition(":")
        server = HttpServer(serve, tls=context(await tls_key(b), ssl.PROTOCOL_TLS_SERVER))
        await server.start_tcp(host, int(port))

        config = (a.directory / "sys-config.json").read_text()
        assert a.env["MESH_SYS_CONFIG"] == str(a.directory / "sys-config.json")
        urls = json.loads(config)["gateway_urls"]
        async with httpx2.AsyncClient(verify=False) as client:
            domain = (await client.get(f"{urls[0]}/prpc/Info")).json()["base_domain"]
        to_host, _, to_port = a.env["MESH_GATEWAY_CONNECT"].rpartition(":")
        for identifier in (b.app_id, b.instance_id):
            reader, writer = await asyncio.open_connection(
                to_host,
                int(to_port),
                ssl=context(await tls_key(a), ssl.PROTOCOL_TLS_CLIENT),
                server_hostname=f"{identifier}-{a.env['MESH_DEFAULT_PORT']}s.{domain}",
            )
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            async with asyncio.timeout(5):
                assert (await reader.read()).endswith(b"from b")
            writer.close()
            await writer.wait_closed()
        await server.aclose()


async def test_environment_is_a_shell_file_with_the_promised_names(tmp_path: Path) -> None:
    directory = tmp_path / "it's here"
    async with World(["a"], directory) as world:
        app = world.apps["a"]
        assert list(app.env) == VARIABLES
        lines = (directory / "a" / "env").read_text().splitlines()
        assert [line.split("=")[0] for line in lines] == [f"export {name}" for name in VARIABLES]
        shell = await asyncio.create_subprocess_exec(
            "sh", "-c", '. "$0"; env', directory / "a" / "env", env={}, stdout=subprocess.PIPE
        )
        shown = (await shell.communicate())[0].decode()
        for name, value in app.env.items():
            assert f"{name}={value}\n" in shown


async def test_every_listener_has_a_port_of_its_own_and_inbound_the_common_one() -> None:
    async with World(["a", "b", "c"]) as world:
        apps = world.apps.values()
        inbound = {app.env["MESH_INBOUND_LISTEN"] for app in apps}
        default = {app.env["MESH_DEFAULT_PORT"] for app in apps}
        others = [
            app.env[name] for app in apps for name in ("MESH_OUTBOUND_LISTEN", "MESH_ADMIN_LISTEN")
        ]
    assert len({app.rpartition(":")[0] for app in inbound}) == 3
    assert {app.rpartition(":")[2] for app in inbound} == default
    assert len(default) == 1
    assert len(set(others)) == 6


async def test_ids_are_the_same_in_every_run_and_keys_with_the_same_seed() -> None:
    found = []
    for _ in range(2):
        async with World(["a"], seed=b"seed") as world:
            app = world.apps["a"]
            assert app.app_id == app_id_of("a")
            assert app.instance_id == instance_id_of("a")
            found.append((app.host, world.kms.app_ca(AppId(app.app_id))[0].private_numbers()))
    assert found[0] == found[1]


async def test_temporary_directory_goes_and_a_given_one_stays(tmp_path: Path) -> None:
    async with World(["a"]) as world:
        temporary = world.directory
        assert (temporary / "a" / "dstack.sock").is_socket()
    assert not temporary.exists()

    given = tmp_path / "new" / "deep"
    for _ in range(2):
        async with World(["a"], given) as world:
            assert (given / "a" / "dstack.sock").is_socket()
    assert sorted(path.name for path in (given / "a").iterdir()) == ["env", "sys-config.json"]


async def test_directory_of_a_live_simulator_is_refused(tmp_path: Path) -> None:
    async with World(["a"], tmp_path) as first:
        with pytest.raises(WorldError, match="a simulator already runs here"):
            await World(["b"], tmp_path).start()
        assert await tls_key(first.apps["a"])
    async with World(["b"], tmp_path):
        pass


async def test_socket_that_somebody_answers_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "dstack.sock"
    server = await asyncio.start_unix_server(hang_up, path)
    with pytest.raises(WorldError, match="another process answers"):
        await World(["a"], tmp_path).start()
    server.close()
    async with World(["a"], tmp_path):
        pass


async def test_given_host_is_routed_to() -> None:
    async with World(["a=127.0.0.1", "b=mesh-b", "c=192.0.2.7"]) as world:
        a, b, c = world.apps["a"], world.apps["b"], world.apps["c"]
        port = a.env["MESH_DEFAULT_PORT"]
        assert (a.host, b.host, c.host) == ("127.0.0.1", "mesh-b", "192.0.2.7")
        assert a.env["MESH_INBOUND_LISTEN"] == f"127.0.0.1:{port}"
        assert b.env["MESH_INBOUND_LISTEN"] == f"0.0.0.0:{port}"
        assert c.env["MESH_INBOUND_LISTEN"] == f"192.0.2.7:{port}"

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        target = server.sockets[0].getsockname()[1]
        with pytest.raises((OSError, EOFError)):
            await asyncio.open_connection(
                world.gateway.address.host,
                world.gateway.address.port,
                ssl=context(await tls_key(a), ssl.PROTOCOL_TLS_CLIENT),
                server_hostname=f"{a.app_id}-{target}s.{world.gateway.base_domain}",
            )
        server.close()


async def test_description_is_json() -> None:
    async with World(["a"]) as world:
        described = json.loads(json.dumps(world.describe()))
        assert described["dir"] == str(world.directory)
        assert described["apps"]["a"]["env"] == world.apps["a"].env
        assert described["gateway"] == world.apps["a"].env["MESH_GATEWAY_CONNECT"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", None)), (" b-1_ ", ("b-1_", None)), ("a=host:x", ("a", "host:x"))],
)
def test_parse_app(text: str, expected: tuple[str, str | None]) -> None:
    assert parse_app(text) == expected


@pytest.mark.parametrize("text", ["", "..", "a/b", "-a", "a b", "ä", "a" * 33, "a=", "a=b c", "=h"])
def test_parse_app_refuses(text: str) -> None:
    with pytest.raises(BadWorldError):
        parse_app(text)


def test_no_app_two_of_one_name_and_a_wildcard_are_refused() -> None:
    with pytest.raises(BadWorldError, match="at least one"):
        World([])
    with pytest.raises(BadWorldError, match="twice"):
        World(["a", "a=host"])
    with pytest.raises(BadWorldError, match=r"0\.0\.0\.0"):
        World(["a"], listen="0.0.0.0")


async def test_long_path_and_unusable_directory_are_told(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="use a shorter --dir"):
        await World(["a"], tmp_path / ("x" * 100)).start()
    (tmp_path / "file").touch()
    with pytest.raises(WorldError, match="file"):
        await World(["a"], tmp_path / "file" / "dir").start()
    with pytest.raises(WorldError):
        await World(["a"], listen="192.0.2.1").start()


async def test_failed_start_leaves_no_file_open(tmp_path: Path) -> None:
    async def fail() -> None:
        with pytest.raises(WorldError):
            await World(["a", "x" * 30], tmp_path / ("y" * (85 - len(str(tmp_path))))).start()

    await fail()  # the loop opens a spare descriptor with its first listener
    before = open_files()
    await fail()
    async with asyncio.timeout(5):  # the loop closes in its own time
        while open_files() != before:  # noqa: ASYNC110 - the loop tells nobody when it has closed
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1", ("127.0.0.1", 0)),
        ("sim:443", ("sim", 443)),
        ("::1", ("::1", 0)),
        ("[::1]:443", ("::1", 443)),
        ("sim:0", ("sim", 0)),
    ],
)
def test_listen_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize("text", ["sim:x", "sim:65536", "sim:-1", "sim:"])
def test_listen_addresses_that_are_none(text: str) -> None:
    with pytest.raises(BadWorldError, match="is not a port"):
        parse_listen(text)


@pytest.mark.parametrize("text", ["0.0.0.0", "0.0.0.0:443", "[::]:443"])
def test_a_listen_address_that_sidecars_cannot_connect_to(text: str) -> None:
    with pytest.raises(BadWorldError, match="connect to it by this name"):
        World(["a"], listen=text)
