"""A mesh with something to see on its status page, and a browser to look at it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from dstack_mesh.sim.messages import Request, Response
from tests.integration.harness import Client, Mesh, mesh, request
from tests.integration.tls_peers import caller_context

if TYPE_CHECKING:
    from playwright.async_api import Browser

APPS = ("billing", "shop", "search", "ledger", "intruder")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.asynccontextmanager
async def browser(*arguments: str) -> AsyncIterator[Browser]:
    """Run the system's chromium for the block."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        one = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *arguments]
        )
        try:
            yield one
        finally:
            await one.close()


@contextlib.asynccontextmanager
async def scene(tmp_path: Path) -> AsyncIterator[Mesh]:
    """Run `billing`, which `shop` and `search` may call, and the apps around it."""
    async with mesh(tmp_path, APPS) as one:
        allowed = f"{one.app_id('shop')},{one.app_id('search')}"
        await one.start("billing", MESH_ALLOWED_APPS=allowed)
        for name in ("shop", "search", "intruder"):
            await one.start(name)
        for backend in one.backends.values():
            backend.on("/work", work)
        yield one


async def work(_: Request) -> Response:
    """Take as long as a service does: mostly some milliseconds, at times much more."""
    await asyncio.sleep(min(1.0, random.lognormvariate(-5.2, 0.9)))
    return Response(200, [("content-type", "text/plain")], b"x" * random.randrange(200, 4000))


async def refusals(one: Mesh) -> None:
    """Have `billing` refuse and fail in the ways that a night may bring."""
    await one.call("intruder", "billing", "POST", "/api/invoices?token=secret", body=b"x")
    await one.call("billing", "ledger", "GET", "/entries")
    await one.call("billing", None, "GET", "/health")
    await one.call("billing", "zz", "GET", "/")
    inbound = one.inbound("billing")
    async with Client.connect(inbound) as plain:
        await plain.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await plain.closed()
    async with Client.connect(inbound, caller_context(one.world.kms.root_pem, None)) as nobody:
        await nobody.send(request("GET", "/admin"))
        await nobody.answer()


async def traffic(one: Mesh, per_second: float) -> None:
    """Call to and fro, on connections that are kept, until cancelled."""
    async with asyncio.TaskGroup() as tasks:
        for caller, target, share in (
            ("shop", "billing", 0.55),
            ("search", "billing", 0.1),
            ("billing", "shop", 0.3),
            ("billing", None, 0.05),
        ):
            tasks.create_task(_calls(one, caller, target, per_second * share))


async def _calls(one: Mesh, caller: str, target: str | None, per_second: float) -> None:
    fields = [("x-dstack-target-app", one.app_id(target))] if target else []
    path = "/work" if target else "/info"
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with Client.connect(one.outbound(caller)) as client:
        while True:
            await client.send(request("GET", path, fields))
            await client.answer()
            swell = 1 + 0.5 * math.sin((loop.time() - began) / 9)
            await asyncio.sleep(random.expovariate(per_second * swell))
