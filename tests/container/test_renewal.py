"""Renewals under load, in each inbound mode: not a request fails, not a connection ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from dstack_mesh.sim.world import app_id_of
from tests.container.docker import BUILD_SECONDS, EXAMPLE, Stack, docker, eventually
from tests.container.load import Load, load

pytestmark = [pytest.mark.container, pytest.mark.timeout(BUILD_SECONDS)]

BILLING = app_id_of("billing")
SECONDS = 30
"""Of load: three renewals on each side."""


@pytest.fixture(scope="module", params=["embedded", "nginx"])
def short_lived(image: str, request: pytest.FixtureRequest) -> Iterator[Stack]:
    files = (EXAMPLE, Path(__file__).with_name("short-lived.yml"))
    one = Stack(f"mesh-renewal-{request.param}", request.param, files=files)
    one.down()
    try:
        one.up()
        yield one
    finally:
        one.down()


def renewals(stack: Stack, service: str, event: str) -> int:
    return stack.log(service).count(f'"event": "{event}"')


async def _websocket(host: str, until: asyncio.Event) -> int:
    said = 0
    async with connect(
        f"ws://{host}/ws", additional_headers={"x-dstack-target-app": BILLING}
    ) as one:
        while not until.is_set():
            await one.send(str(said))
            async with asyncio.timeout(20):
                assert await one.recv() == str(said)
            said += 1
            await asyncio.sleep(0.2)
    return said


async def _run(host: str) -> tuple[Load, int]:
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(SECONDS, until.set)
    return await asyncio.gather(
        load(host, 80, BILLING, clients=8, until=until), _websocket(host, until)
    )


async def test_renewals_under_load(short_lived: Stack) -> None:
    stack = short_lived
    event = "nginx_identity" if stack.mode == "nginx" else "identity_renewed"
    before = renewals(stack, "billing-mesh", event)
    told, said = await _run(stack.address("shop-mesh", "shop"))
    assert told.failures == []
    assert told.requests > 100
    assert said > SECONDS  # one WebSocket, opened under the first certificate
    assert renewals(stack, "billing-mesh", event) - before >= 2
    assert renewals(stack, "shop-mesh", "identity_renewed") >= 2
    if stack.mode == "nginx":
        assert "nginx_reloaded" not in stack.log("billing-mesh")


def test_new_connections_get_the_new_certificate(short_lived: Stack) -> None:
    """And the key that fits it; old generations do not pile up."""
    stack = short_lived
    line = (
        "import ssl, socket, hashlib; c = ssl.create_default_context(); c.check_hostname = False;"
        " c.verify_mode = ssl.CERT_NONE;"
        " s = c.wrap_socket(socket.create_connection(('billing-mesh', 443), 10));"
        " print(hashlib.sha256(s.getpeercert(True)).hexdigest())"
    )
    container = stack.container("sim")

    def seen() -> str:
        return docker("exec", container, "python3", "-c", line).strip()

    first = seen()
    eventually(seen, lambda now: now != first, 30)
    if stack.mode == "nginx":
        found = stack.bash("billing-mesh", "ls /dev/shm/dstack-mesh/identity").split()
        assert len([name for name in found if name.isdigit()]) == 2
