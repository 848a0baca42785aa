"""`dstack-mesh await` before and behind a real sidecar (interface.md, Lifecycle)."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE
from pathlib import Path

from tests.integration.harness import mesh
from tests.integration.processes import COMMAND, clean_environ


async def test_it_waits_for_the_identity_and_runs_the_command(tmp_path: Path) -> None:
    async with mesh(tmp_path, ["a"]) as one:
        one.app("a").agent.failing = True
        environ = {"MESH_ADMIN_LISTEN": f"unix:{tmp_path}/admin.sock"}
        sidecar = await one.start_closed("a", **environ, MESH_OUTBOUND_LISTEN="127.0.0.1:0")
        waiting = await asyncio.create_subprocess_exec(
            *COMMAND, "await", "--timeout", "30", "--", "echo", "the app",
            env={**clean_environ(), **environ}, stdout=PIPE, stderr=PIPE,
        )  # fmt: skip
        assert waiting.stdout is not None
        assert waiting.stderr is not None
        try:
            async with asyncio.timeout(20):
                told = (await waiting.stderr.readline()).decode()
                assert told.startswith("dstack-mesh: waiting: ")
                assert "this mesh has no certificate yet" in told
                one.app("a").agent.failing = False
                assert await waiting.stdout.read() == b"the app\n"
                assert await waiting.wait() == 0
        finally:
            if waiting.returncode is None:
                waiting.kill()
                await waiting.wait()
        assert sidecar.identity.current is not None
