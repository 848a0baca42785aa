"""The lines that users of the Rust mesh have in their scripts, run as they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstack_mesh.sim.backend import Backend
from tests.integration.harness import eventually
from tests.integration.processes import COMMAND, clean_environ

INFO = "curl -s http://dstack-mesh/info | jq -r .app_id"
CALL = 'curl -H "x-dstack-target-app: $APP_ID" http://dstack-mesh/api/data'
CALL_PORT = (
    'curl -H "x-dstack-target-app: $APP_ID" -H "x-dstack-target-port: $PORT"'
    " http://dstack-mesh/api/data"
)
CALL_HOST = (
    'curl -H "x-dstack-target-app: $APP_ID" -H "Host: vpc-server" http://dstack-mesh/api/data'
)
CALL_ALL = (
    'curl -H "x-dstack-target-app: $APP_ID" -H "x-dstack-target-port: $PORT"'
    ' -H "Host: vpc-server" http://dstack-mesh/api/data'
)


@pytest.fixture(autouse=True, scope="module")
def tools() -> None:
    missing = [name for name in ("bash", "curl", "jq") if shutil.which(name) is None]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; CI has to have them")
        pytest.skip(reason)


@dataclass
class Ran:
    """What became of a line."""

    status: int
    output: str
    error: str


@dataclass
class Site:
    """A simulator and two sidecars, `shop` calling and `billing` called, all processes."""

    directory: Path
    apps: dict[str, dict[str, str]]
    """What `sim --json` said of each app's environment."""

    ids: dict[str, str]
    ready: dict[str, dict[str, str]]
    backend: Backend

    async def bash(self, at: str, line: str, **variables: str) -> Ran:
        """Run `line` in the app `at`, where `dstack-mesh` is the sidecar's outbound address."""
        line = line.replace("//dstack-mesh/", f"//{self.ready[at]['outbound']}/")
        process = await asyncio.create_subprocess_exec(
            *("bash", "-o", "pipefail", "-c", line),
            env={**clean_environ(), "NO_PROXY": "*", **variables},
            stdout=PIPE,
            stderr=PIPE,
        )
        try:
            async with asyncio.timeout(20):
                output, error = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return Ran(process.returncode, output.decode(), error.decode())


async def _end(process: Process) -> int:
    """Stop a process as a service manager does."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(20):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode is not None
    return process.returncode


async def _sidecar(stack: contextlib.AsyncExitStack, app: Path, backend: str) -> dict[str, str]:
    """Start a sidecar as the simulator's printed lines say; give its ready file."""
    ready = app / "ready.json"
    command = shlex.join((*COMMAND, "run", "--ready-file", str(ready)))
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", f". {shlex.quote(str(app))}/env; MESH_BACKEND={backend} exec {command}"),
        env=clean_environ(),
        stderr=asyncio.subprocess.DEVNULL,
    )
    stack.push_async_callback(_end, process)
    await eventually(lambda: ready.exists() or process.returncode is not None, 20)
    found: dict[str, str] = json.loads(ready.read_text())
    return found


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with contextlib.AsyncExitStack() as stack:
        backend = Backend("billing")
        stack.push_async_callback(backend.aclose)
        address = str(await backend.start())
        sim = await asyncio.create_subprocess_exec(
            *(*COMMAND, "sim", "--apps", "shop,billing", "--dir", str(tmp_path / "m"), "--json"),
            env=clean_environ(),
            stdout=PIPE,
        )
        stack.push_async_callback(_end, sim)
        assert sim.stdout is not None
        async with asyncio.timeout(20):
            world = json.loads(await sim.stdout.readline())
        apps = world["apps"]
        ready = {
            name: await _sidecar(stack, Path(app["dir"]), address) for name, app in apps.items()
        }
        yield Site(
            Path(world["dir"]),
            {name: app["env"] for name, app in apps.items()},
            {name: app["app_id"] for name, app in apps.items()},
            ready,
            backend,
        )


async def test_the_users_lines(site: Site) -> None:
    told = await site.bash("billing", INFO)
    assert (told.status, told.output) == (0, site.ids["billing"] + "\n")
    app_id = told.output.strip()
    port = site.apps["billing"]["MESH_DEFAULT_PORT"]
    site.backend.on("/api/data", site.backend._handlers["/echo"])
    for line, host in (
        (CALL, site.ready["shop"]["outbound"]),
        (CALL_PORT, site.ready["shop"]["outbound"]),
        (CALL_HOST, "vpc-server"),
        (CALL_ALL, "vpc-server"),
    ):
        ran = await site.bash("shop", line, APP_ID=app_id, PORT=port)
        assert ran.status == 0, ran
        seen = json.loads(ran.output)
        assert (seen["method"], seen["target"]) == ("GET", "/api/data")
        fields = [(name.lower(), value) for name, value in seen["headers"]]
        assert [value for name, value in fields if name == "host"] == [host]
        callers = [value for name, value in fields if name == "x-dstack-app-id"]
        assert callers == [site.ids["shop"]]
        assert not [name for name, _ in fields if name.startswith("x-dstack-target-")]


async def test_both_lines_in_one_script(site: Site) -> None:
    """An app that calls itself: the commonest way to try the mesh out."""
    ran = await site.bash("billing", f"APP_ID=$({INFO}) && {CALL.replace('/api/data', '/')}")
    assert (ran.status, ran.output) == (0, "hello\n")


async def test_the_port_header_says_where_the_call_goes(site: Site) -> None:
    """Nobody listens on port 1 there."""
    ran = await site.bash(
        "shop", CALL_PORT.replace("curl", "curl -s"), APP_ID=site.ids["billing"], PORT="1"
    )
    assert json.loads(ran.output)["code"] == "tls_failed"
    assert not site.backend.requests


async def test_an_app_id_that_is_none_is_told(site: Site) -> None:
    ran = await site.bash("shop", CALL.replace("curl", "curl -s"), APP_ID="null")
    problem = json.loads(ran.output)
    assert (problem["code"], problem["status"]) == ("bad_target", 400)
    assert "null" in problem["detail"]
