"""SIGUSR1: the end is near, but not yet: whoever ends nginx first says so by it."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

from tests.integration.harness import Answer, Client, mesh, request
from tests.integration.processes import sidecar_process


async def test_readyz_turns_and_everything_goes_on(tmp_path: Path) -> None:
    async with mesh(tmp_path / "w") as one:
        environ = {
            **one.app("a").env,
            "MESH_INBOUND_MODE": "nginx",
            "MESH_AUTH_LISTEN": "127.0.0.1:0",
        }
        async with sidecar_process(tmp_path, environ) as process:

            async def ask(listener: str, path: str) -> Answer:
                async with Client.connect(process.address(listener)) as client:
                    await client.send(request("GET", path))
                    return await client.answer()

            async def ready(status: int) -> Answer:
                async with asyncio.timeout(20):
                    while True:
                        answer = await ask("admin", "/readyz")
                        if answer.status == status:
                            return answer
                        await asyncio.sleep(0.02)

            await ready(200)
            process.signal(signal.SIGUSR1)
            told = await ready(503)
            assert json.loads(told.body)["checks"]["draining"]["ok"] is False
            assert (await ask("auth", "/health")).status == 200
            assert (await ask("outbound", "/health")).status == 200
            process.signal(signal.SIGTERM)
            assert await process.exit_status() == 0
