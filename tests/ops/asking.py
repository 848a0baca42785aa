"""What a running sidecar tells of itself, asked for as an operator does."""

from __future__ import annotations

from tests.integration.harness import Client, Mesh, request
from tests.ops.test_metrics import only, parse

from dstack_mesh.ops.report import Status


async def status(one: Mesh, name: str) -> Status:
    return (await one.sidecars[name].reporter.collect()).status


async def ask(one: Mesh, name: str, path: str) -> tuple[int, bytes]:
    async with Client.connect(one.admin(name)) as client:
        await client.send(request("GET", path, [("Host", "localhost")]))
        answer = await client.answer()
    return answer.status, answer.body


async def metrics(one: Mesh, name: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Give each metric without its namespace, by the labels' values in the order of their names."""
    found = parse((await ask(one, name, "/metrics"))[1].decode())
    return {key.removeprefix("dstack_mesh_"): only(family) for key, family in found.items()}
