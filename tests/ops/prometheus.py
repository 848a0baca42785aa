"""Prometheus from Debian's package: its checker, and the server itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.harness import Client, request

from dstack_mesh.model import TcpAddress

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (package prometheus)"
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (package prometheus)"
)

_CONFIG = """\
global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: dstack-mesh
    static_configs: [{{targets: ["{target}"]}}]
"""


def promtool(*arguments: str, text: str = "") -> str:
    """Run promtool; give what it said, and fail where it found something."""
    ran = subprocess.run(
        ["promtool", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    return said


class Prometheus:
    """A server that scrapes one sidecar."""

    def __init__(self, address: TcpAddress) -> None:
        self._address = address

    async def get(self, path: str) -> Any:
        async with Client.connect(self._address) as client:
            await client.send(request("GET", path))
            answer = await client.answer()
        assert answer.status == 200, answer.body
        return json.loads(answer.body)["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        found = await self.get(f"/api/v1/query?query={urllib.parse.quote(expression)}")
        result: list[dict[str, Any]] = found["result"]
        return result

    async def until(self, expression: str) -> list[dict[str, Any]]:
        """Ask until the answer is not empty."""
        async with asyncio.timeout(20):
            while True:
                found = await self.query(expression)
                if found:
                    return found
                await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def prometheus(directory: Path, target: TcpAddress, rules: Path) -> AsyncIterator[Prometheus]:
    """Run a server for the block, with its data in `directory`."""
    config = directory / "prometheus.yml"
    config.write_text(_CONFIG.format(target=target, rules=rules))
    log = directory / "prometheus.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            stdout=output,
            stderr=output,
        )
    try:
        yield Prometheus(await _address(process, log))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _address(process: asyncio.subprocess.Process, log: Path) -> TcpAddress:
    """Wait until it answers; it listens on a port of its own choice."""
    async with asyncio.timeout(30):
        while not _is_ready(log):
            assert process.returncode is None, "it ended: see prometheus.log"
            await asyncio.sleep(0.05)
    return TcpAddress("127.0.0.1", _port(process.pid))


def _is_ready(log: Path) -> bool:
    return "Server is ready" in log.read_text()


def _port(pid: int) -> int:
    """Give the port on which a process listens."""
    inodes = _sockets(pid)
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (local,) = [fields[1] for fields in lines if fields[9] in inodes and fields[3] == "0A"]
    return int(local.rpartition(":")[2], 16)


def _sockets(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            if match:
                found.add(match[1])
    return found
