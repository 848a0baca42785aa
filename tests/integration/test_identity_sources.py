"""Where the mesh's identity comes from: an agent that is late or of the wrong kind, and files."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstack_mesh.identity import store
from dstack_mesh.model import UnixAddress
from dstack_mesh.sidecar import Sidecar
from dstack_mesh.sim.certificates import Issued
from tests.integration.harness import Client, Mesh, eventually, mesh, problem, readyz, request
from tests.integration.tls_peers import call_inbound, caller_context, new_app_id


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again and look again soon; how soon in earnest is tested with the store."""
    monkeypatch.setattr(store, "FIRST_RETRY", 0.1)
    monkeypatch.setattr(store, "LAST_RETRY", 0.2)
    monkeypatch.setattr(store, "POLL", 0.05)


@contextlib.asynccontextmanager
async def started(one: Mesh) -> AsyncIterator[tuple[Sidecar, asyncio.Task[None]]]:
    """Start `a` with a backend, and have it open inbound as soon as there is an identity."""
    backend = await one.start_backend("a")
    side = await one.start_closed(
        "a",
        MESH_OUTBOUND_LISTEN="127.0.0.1:0",
        MESH_ADMIN_LISTEN="127.0.0.1:0",
        MESH_BACKEND=str(backend),
    )
    opened = asyncio.create_task(side.wait_open())
    try:
        yield side, opened
    finally:
        opened.cancel()
        await asyncio.gather(opened, return_exceptions=True)


async def test_an_agent_that_comes_later(tmp_path: Path) -> None:
    async with mesh(tmp_path) as one:
        await one.start("b")
        app = one.app("a")
        await app.agent.aclose()
        async with started(one) as (side, opened):
            await eventually(lambda: side.identity.failed > 0)
            detail = str(problem(await one.call("a", "b"), "identity_unavailable", 503)["detail"])
            assert str(app.directory / "dstack.sock") in detail, "the reader learns what is missing"
            problem(await one.call("a", None, path="/info"), "agent_unavailable", 502)
            assert (await one.call("a", None, path="/health")).status == 200
            status, reason = await readyz(one, "a")
            assert status == 503
            assert reason == detail
            async with Client.connect(one.admin("a")) as client:
                await client.send(request("GET", "/livez"))
                assert (await client.answer()).status == 200
            assert not opened.done()

            await app.agent.start(UnixAddress(str(app.directory / "dstack.sock")))
            async with asyncio.timeout(10):
                await opened
            await eventually(lambda: side.directory.current is not None)
            assert (await readyz(one, "a"))[0] == 200
            assert (await one.call("a", None, path="/info")).status == 200
            for caller, target in (("a", "b"), ("b", "a")):
                assert (await one.call(caller, target)).body == b"hello\n"


async def test_a_caller_that_came_before_the_identity_is_served_after(tmp_path: Path) -> None:
    """Inbound's address is taken at the start; who connects waits until there is an identity."""
    async with mesh(tmp_path, ["a"]) as one:
        kms = one.world.kms
        one.app("a").agent.failing = True
        async with started(one) as (side, opened):
            await eventually(lambda: side.identity.failed > 0)
            context = caller_context(kms.root_pem, kms.issue(new_app_id()))
            call = asyncio.create_task(call_inbound(one.inbound("a"), context))
            one.app("a").agent.failing = False
            assert (await call).body == b"hello\n"
            assert opened.done()


async def test_a_local_key_provider_is_told_in_those_words(tmp_path: Path) -> None:
    words = (
        "this machine's keys come from a local key provider: its certificate carries no app-id, "
        "so it can't be a member of a mesh"
    )
    async with mesh(tmp_path) as one:
        agent = one.app("a").agent
        agent.local_key_provider = True
        async with started(one) as (side, opened):
            await eventually(lambda: side.identity.failed > 0)
            status, reason = await readyz(one, "a")
            assert status == 503
            assert words in reason
            detail = problem(await one.call("a", "b"), "identity_unavailable", 503)["detail"]
            assert words in str(detail)
            assert (await one.call("a", None, path="/info")).status == 200, "the agent is there"
            agent.local_key_provider = False
            async with asyncio.timeout(10):
                await opened
            assert (await readyz(one, "a"))[0] == 200


@dataclass
class Files:
    """An identity as PEM files on disk."""

    directory: Path

    @property
    def env(self) -> dict[str, str]:
        names = {"MESH_CERT_FILE": "cert", "MESH_KEY_FILE": "key", "MESH_CA_FILE": "ca"}
        return {key: str(self.directory / f"{name}.pem") for key, name in names.items()}

    def write(self, issued: Issued, root_pem: bytes) -> None:
        issued.write(self.directory)
        (self.directory / "ca.pem").write_bytes(root_pem)


def generation(side: Sidecar) -> int:
    current = side.identity.current
    return current.generation if current is not None else 0


async def test_files_that_are_replaced(tmp_path: Path) -> None:
    files = Files(tmp_path)
    async with mesh(tmp_path / "world") as one:
        kms, app_id = one.world.kms, one.app_id("a")
        first, second = kms.issue(app_id, subject="first"), kms.issue(app_id, subject="second")
        files.write(first, kms.root_pem)
        side = await one.start("a", backend=True, **files.env)
        await one.start("b")
        assert (await one.call("a", "b")).status == 200
        assert not one.app("a").agent.calls["GetTlsKey"], "nobody asked the agent"

        # First the certificate alone: until the key follows, the old pair serves.
        (tmp_path / "cert.pem").write_bytes(second.bundle)
        await eventually(lambda: side.identity.failed > 0)
        assert generation(side) == 1
        assert (await one.call("a", "b")).status == 200
        assert (await readyz(one, "a"))[0] == 200
        (tmp_path / "key.pem").write_bytes(second.key_pem)
        await eventually(lambda: generation(side) == 2)
        for caller, target in (("a", "b"), ("b", "a")):
            assert (await one.call(caller, target)).status == 200


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cert.pem", "cert.pem has no PEM certificate"),
        ("key.pem", "private key"),
        ("ca.pem", "ca.pem"),
    ],
)
async def test_a_file_that_is_empty_at_first(tmp_path: Path, name: str, told: str) -> None:
    files = Files(tmp_path)
    async with mesh(tmp_path / "world", ["a"]) as one:
        kms = one.world.kms
        files.write(kms.issue(one.app_id("a")), kms.root_pem)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"")
        side = await one.start_closed("a", **files.env)
        await eventually(lambda: side.identity.failed > 0)
        status, reason = await readyz(one, "a")
        assert status == 503
        assert told in reason
        (tmp_path / name).write_bytes(content)
        await eventually(lambda: generation(side) == 1)
        assert (await readyz(one, "a"))[1] == f"app {one.app_id('a')}"
