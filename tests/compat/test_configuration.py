"""What users of the Rust mesh configure: its TOML file, its call, ports and environment names."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest

from dstack_mesh.model import TcpAddress
from dstack_mesh.settings.load import Loaded, load_settings, value_of
from dstack_mesh.sim.ports import common_port
from tests.integration.harness import Client, Mesh, mesh, request
from tests.integration.processes import COMMAND, clean_environ

FILE = """\
[client]
enabled = {client}
address = "127.0.0.1"
port = {client_port}

[auth]
enabled = {auth}
address = "127.0.0.1"
port = {auth_port}

[dstack]
gateway_domain = "{gateway}"

[tls]
cert_file = "{directory}/server.crt"
key_file = "{directory}/server.key"
ca_file = "{directory}/ca.crt"
"""


def write_file(
    one: Mesh,
    directory: Path,
    gateway: str,
    *,
    client: bool = True,
    auth: bool = True,
) -> tuple[Path, TcpAddress, TcpAddress]:
    """Write the file with an identity of app `a`; give it and the addresses it names."""
    issued = one.world.kms.issue(one.app_id("a"))
    # All that the agent gives, root included, as the Rust mesh's start script writes it.
    (directory / "server.crt").write_bytes(b"".join(issued.chain_pem))
    (directory / "server.key").write_bytes(issued.key_pem)
    (directory / "ca.crt").write_bytes(one.world.kms.root_pem)
    first = common_port(["127.0.0.1"])
    second = common_port(["127.0.0.1"], {first})
    words = {True: "true", False: "false"}
    file = directory / "dstack-mesh.toml"
    values = {"client": words[client], "auth": words[auth], "gateway": gateway}
    file.write_text(FILE.format(**values, client_port=first, auth_port=second, directory=directory))
    return file, TcpAddress("127.0.0.1", first), TcpAddress("127.0.0.1", second)


@contextlib.asynccontextmanager
async def running(file: Path, *listeners: TcpAddress) -> AsyncIterator[None]:
    """Run `dstack-mesh -c FILE`, as the Rust mesh is called, from when it listens."""
    environ = {**clean_environ(), "MESH_ADMIN_LISTEN": "off"}
    process = await asyncio.create_subprocess_exec(
        *(*COMMAND, "-c", str(file)), env=environ, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        for address in listeners:
            await _answers(address, process)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(40):
            await process.wait()


async def _answers(address: TcpAddress, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(20):
        while True:
            assert process.returncode is None
            try:
                _, writer = await asyncio.open_connection(address.host, address.port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with mesh(tmp_path / "w") as found:
        yield found


async def test_the_file_as_it_is(one: Mesh, tmp_path: Path) -> None:
    """All four sections, `fixed/` included: the client proxy calls, the auth service judges."""
    await one.start("b")
    file, client_at, auth_at = write_file(one, tmp_path, f"fixed/{one.inbound('b')}")
    async with running(file, client_at, auth_at):
        target = [("x-dstack-target-app", one.app_id("b"))]
        async with Client.connect(client_at) as client:
            await client.send(request("GET", "/echo", target))
            answer = await client.answer()
        fields = dict(json.loads(answer.body)["headers"])
        assert (answer.status, fields["x-dstack-app-id"]) == (200, one.app_id("a"))

        leaf = one.world.kms.issue(one.app_id("b")).leaf_pem
        shown = [("x-client-verify", "SUCCESS"), ("x-client-cert", quote(leaf, safe=""))]
        async with Client.connect(auth_at) as nginx:
            await nginx.send(request("GET", "/auth", shown, version="1.0"))
            judged = await nginx.answer()
        assert (judged.status, judged.get(b"x-dstack-app-id")) == (200, one.app_id("b").encode())


async def test_a_domain_in_the_file(one: Mesh, tmp_path: Path) -> None:
    """`base.domain:port`, as its start script writes it after asking the gateway."""
    domain = f"{one.world.gateway.base_domain}:{one.world.gateway.address.port}"
    file, client_at, _ = write_file(one, tmp_path, domain, auth=False)
    async with running(file, client_at), Client.connect(client_at) as client:
        await client.send(request("GET", "/gateway"))
        assert json.loads((await client.answer()).body) == {"gateway_domain": domain}


async def test_enabled_false(one: Mesh, tmp_path: Path) -> None:
    file, client_at, auth_at = write_file(one, tmp_path, "fixed/127.0.0.1:1", client=False)
    async with running(file, auth_at):
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await asyncio.open_connection(client_at.host, client_at.port)
    file, client_at, auth_at = write_file(one, tmp_path, "fixed/127.0.0.1:1", auth=False)
    async with running(file, client_at):
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await asyncio.open_connection(auth_at.host, auth_at.port)


def read(environ: dict[str, str], file: Path | None = None) -> Loaded:
    return load_settings({}, environ, file, exists=lambda path: True)


def test_values_left_empty_in_the_file(tmp_path: Path) -> None:
    """What its start script did not know it leaves empty; that is not known, and not an error."""
    file = tmp_path / "f.toml"
    file.write_text('[client]\n[dstack]\ngateway_domain = ""\n[tls]\ncert_file = ""\n')
    settings = read({}, file).settings
    assert settings.dstack.gateway_domain is None
    assert settings.tls.cert_file is None


def test_the_ports_that_scripts_know() -> None:
    command = [*COMMAND, "config", "--json"]
    ran = subprocess.run(command, env=clean_environ(), capture_output=True, timeout=30, check=True)
    told = json.loads(ran.stdout)
    assert told["outbound.listen"]["value"] == "127.0.0.1:8091"
    assert told["inbound.auth_listen"]["value"] == "127.0.0.1:8092"
    assert told["outbound.default_port"]["value"] == 443


def test_the_ports_of_a_file_that_names_none(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text("[client]\n[auth]\n")
    settings = read({}, file).settings
    assert str(settings.outbound.listen) == "127.0.0.1:8091"
    assert str(settings.inbound.auth_listen) == "127.0.0.1:8092"
    assert settings.inbound.mode == "nginx"


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("MESH_BACKEND", "backend-app:8080", "inbound.backend"),
        ("DSTACK_MESH_BACKEND", "backend-app:8080", "inbound.backend"),
        ("DSTACK_GATEWAY_DOMAIN", "gateway.example:8443", "dstack.gateway_domain"),
        ("DSTACK_MESH_SERVER_NAME", "vpc-server", "inbound.server_name"),
        ("DSTACK_AGENT_ADDRESS", "unix:/var/run/dstack.sock", "dstack.agent"),
        ("DSTACK_AGENT_ADDRESS", "http://127.0.0.1:8090", "dstack.agent"),
    ],
)
def test_environment_names(name: str, value: str, key: str) -> None:
    loaded = read({name: value})
    assert loaded.sources[key].name == name
    assert str(getattr(found := value_of(loaded.settings, key), "text", found)) in value
    assert not [warning for warning in loaded.warnings if name in warning]


@pytest.mark.parametrize(
    ("older", "name", "key"),
    [
        ("DSTACK_MESH_BACKEND", "MESH_BACKEND", "inbound.backend"),
        ("DSTACK_GATEWAY_DOMAIN", "MESH_GATEWAY", "dstack.gateway_domain"),
    ],
)
def test_our_own_names_win_over_older_ones(older: str, name: str, key: str) -> None:
    assert read({older: "older:1", name: "ours:2"}).sources[key].name == name


@pytest.mark.parametrize("number", range(4))
def test_the_agent_is_found_where_any_dstack_puts_it(number: int) -> None:
    paths = (
        "/var/run/dstack/dstack.sock",
        "/run/dstack/dstack.sock",
        "/var/run/dstack.sock",
        "/run/dstack.sock",
    )
    found = load_settings({}, {}, None, exists=lambda path: path in paths[number:])
    assert str(found.settings.dstack.agent) == f"unix:{paths[number]}"
    assert found.settings.dstack.sys_config == "/dstack/.host-shared/.sys-config.json"
