"""SIGHUP and systemd, with a sidecar as a process of its own (interface.md, Lifecycle)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from dstack_mesh.sim.backend import Backend
from tests.integration.harness import Client, Mesh, eventually, mesh, problem, request
from tests.integration.processes import COMMAND, SidecarProcess, clean_environ, sidecar_process
from tests.integration.test_identity_sources import Files
from tests.integration.tls_peers import caller_context

_SECONDS = 20.0


@dataclass
class Site:
    """`b` is a process with a settings file; app `a` calls it."""

    mesh: Mesh
    process: SidecarProcess
    config: Path

    def caller(self) -> contextlib.AbstractAsyncContextManager[Client]:
        kms = self.mesh.world.kms
        context = caller_context(kms.root_pem, kms.issue(self.mesh.app_id("a")))
        return Client.connect(self.process.address("inbound"), context)

    def events(self, name: str) -> list[dict[str, object]]:
        return [line for line in self.process.log if line["event"] == name]

    async def reload(self, text: str) -> dict[str, object]:
        """Write the file, send SIGHUP and give the event that says what came of it."""
        names = ("settings_reloaded", "settings_reload_failed")

        def outcomes() -> list[dict[str, object]]:
            return [line for line in self.process.log if line["event"] in names]

        before = len(outcomes())
        self.config.write_text(text)
        self.process.signal(signal.SIGHUP)
        await eventually(lambda: len(outcomes()) > before)
        return outcomes()[before]


@contextlib.asynccontextmanager
async def site(tmp_path: Path, **environ: str) -> AsyncIterator[Site]:
    async with mesh(tmp_path / "world") as one:
        backend = one.backends["b"] = Backend("b")
        app = one.app("b")
        config = tmp_path / "mesh.toml"
        config.write_text("")
        env = {**app.env, "MESH_BACKEND": str(await backend.start()), **environ}
        async with sidecar_process(app.directory, env, config=config) as process:
            yield Site(one, process, config)


async def test_who_may_call_changes_on_open_connections(tmp_path: Path) -> None:
    async with site(tmp_path) as here, here.caller() as client:

        async def status() -> int:
            await client.send(request())
            answer = await client.answer()
            if answer.status != 200:
                problem(answer, "policy_denied", 403)
            return answer.status

        assert await status() == 200
        said = await here.reload("[inbound]\nallow = 'self'\n[log]\nlevel = 'debug'")
        assert said["changed"] == ["inbound.allow", "log.level"]
        assert await status() == 403

        said = await here.reload("[inbound]\nallow = 'any'\n[log]\nlevel = 'loud'")
        assert said["level"] == "error"
        assert "log.level in " in str(said["reason"])
        assert "accepted is debug, info, warning or error" in str(said["reason"])
        assert await status() == 403, "all or nothing"

        said = await here.reload(f"[inbound]\nallow = ['{here.mesh.app_id('a')}']\nlisten = 'off'")
        assert said["changed"] == ["inbound.allow", "log.level"]
        assert await status() == 200
        assert here.events("settings_need_restart") == [], "the environment beats the file"
        assert here.process.process.returncode is None


async def test_the_access_log_is_turned_on_and_off_on_open_connections(tmp_path: Path) -> None:
    async with site(tmp_path) as here, here.caller() as client:

        async def ask(path: str) -> None:
            await client.send(request(target=path))
            await client.answer()

        def told() -> list[object]:
            return [line["path"] for line in here.events("access")]

        await ask("/off")
        for mode in ("all", "errors", "off", "all"):
            said = await here.reload(f"[log]\naccess = '{mode}'")
            assert said["changed"] == ["log.access"]
            await ask(f"/{mode}")
        await eventually(lambda: len(told()) > 1)
        assert told() == ["/all", "/all"]


async def test_what_cannot_change_is_named(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        await here.reload("drain_timeout = '1s'\n[tls]\nmin_version = '1.2'")
        (fixed,) = here.events("settings_need_restart")
        assert fixed["keys"] == ["tls.min_version", "drain_timeout"]
        assert fixed["level"] == "warning"


async def test_certificates_are_read_at_once_or_nothing_is(tmp_path: Path) -> None:
    files, others = Files(tmp_path / "one"), Files(tmp_path / "other")
    for one in (files, others):
        one.directory.mkdir()
    async with site(tmp_path) as here:
        kms, app_id = here.mesh.world.kms, here.mesh.app_id("b")
        lines = [f"{key[5:].lower()} = '{path}'" for key, path in files.env.items()]
        tls = "\n[tls]\n" + "\n".join(lines)
        first = kms.issue(app_id, subject="first")
        files.write(first, kms.root_pem)
        said = await here.reload("[inbound]\nallow = 'self'" + tls)
        assert said["changed"] == ["inbound.allow", "tls.cert_file", "tls.key_file", "tls.ca_file"]
        assert [line["source"] for line in here.events("identity_renewed")] == [
            f"the files {', '.join(list(files.env.values())[:2])} and {files.env['MESH_CA_FILE']}"
        ]
        async with here.caller() as client:
            await client.send(request())
            problem(await client.answer(), "policy_denied", 403)

        (files.directory / "key.pem").write_bytes(kms.issue(app_id).key_pem)
        said = await here.reload("[inbound]\nallow = 'any'" + tls)
        assert said["reason"] == "our private key is not the one of our certificate"
        async with here.caller() as client:
            await client.send(request())
            problem(await client.answer(), "policy_denied", 403)

        (files.directory / "key.pem").write_bytes(first.key_pem)
        said = await here.reload("[inbound]\nallow = 'any'" + tls)
        assert said["event"] == "settings_reloaded"
        async with here.caller() as client:
            await client.send(request())
            assert (await client.answer()).status == 200


async def test_another_kms_is_refused(tmp_path: Path) -> None:
    files = Files(tmp_path)
    async with site(tmp_path) as here, mesh(tmp_path / "foreign", ["b"]) as foreign:
        kms = foreign.world.kms
        files.write(kms.issue(here.mesh.app_id("b")), kms.root_pem)
        lines = [f"{key[5:].lower()} = '{path}'" for key, path in files.env.items()]
        said = await here.reload("[inbound]\nallow = 'self'\n[tls]\n" + "\n".join(lines))
        assert "another KMS root key" in str(said["reason"])
        async with here.caller() as client:
            await client.send(request())
            assert (await client.answer()).status == 200


async def test_systemd_hears_of_a_whole_life(tmp_path: Path) -> None:
    address = f"@dstack-mesh-{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(f"\0{address[1:]}")
        supervisor.setblocking(False)
        loop = asyncio.get_running_loop()
        told: list[str] = []

        async def until(line: str) -> list[str]:
            """Give what is told up to and with the datagram that has `line`."""
            async with asyncio.timeout(_SECONDS):
                while True:
                    lines = (await loop.sock_recv(supervisor, 65536)).decode().split("\n")
                    told.extend(lines)
                    if line in lines:
                        return lines

        environ = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
        async with site(tmp_path, **environ) as here:
            await until("READY=1")
            assert told[0].startswith("STATUS=not ready: this mesh has no certificate yet")
            for _ in range(3):
                await until("WATCHDOG=1")
            here.process.signal(signal.SIGHUP)
            lines = await until("RELOADING=1")
            assert lines[1].startswith("MONOTONIC_USEC=")
            await until("READY=1")
            here.process.signal(signal.SIGTERM)
            await until("STOPPING=1")
            assert await here.process.exit_status() == 0
            assert f"STATUS=ready: app {here.mesh.app_id('b')}" in told


async def test_a_hangup_before_the_identity_ends_nothing(tmp_path: Path) -> None:
    """By default SIGHUP would end the process."""
    async with mesh(tmp_path / "world", ["b"]) as one:
        app = one.app("b")
        app.agent.failing = True
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "run", env={**clean_environ(), **app.env}, stderr=PIPE
        )
        assert process.stderr is not None

        async def until(name: bytes) -> None:
            assert process.stderr is not None
            while name not in await process.stderr.readline():
                assert process.returncode is None

        try:
            async with asyncio.timeout(_SECONDS):
                await until(b"identity_fetch_failed")
                process.send_signal(signal.SIGHUP)
                await until(b"settings_reloaded")
                app.agent.failing = False
                await until(b'"ready"')
                process.send_signal(signal.SIGTERM)
                await process.stderr.read()
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
