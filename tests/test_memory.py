"""When garbage is looked for, and that connections leave none behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dstack_mesh import memory
from dstack_mesh.app import _alone
from dstack_mesh.memory import Collector, let_go
from dstack_mesh.model import TcpAddress
from dstack_mesh.settings.load import load_settings
from dstack_mesh.sidecar import Sidecar
from tests.integration.harness import eventually, mesh
from tests.integration.tls_peers import new_app_id

ROOT = Path(__file__).parents[1]
MANY = 2_000
AT_ONCE = 100


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    threshold, enabled = gc.get_threshold(), gc.isenabled()
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()
    if enabled:
        gc.enable()


# The policy.


class Full:
    """Counts full collections."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            self.count += 1


@pytest.fixture
def full() -> Iterator[Full]:
    one = Full()
    gc.callbacks.append(one)
    yield one
    gc.callbacks.remove(one)


async def test_what_is_there_at_the_start_is_not_looked_at_again() -> None:
    before = gc.get_threshold()
    collector = Collector(asyncio.get_running_loop(), lambda: 0)
    collector.start()
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < gc.get_freeze_count() / 10
    assert gc.get_threshold()[0] == 10_000
    collector.stop()
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == before
    collector.stop()


async def test_many_new_objects_bring_no_full_collection(full: Full) -> None:
    collector = Collector(asyncio.get_running_loop(), lambda: 0)
    collector.start()
    assert full.count == 1
    kept = [[number] for number in range(500_000)]
    assert full.count == 1, f"among {len(kept)} objects it would take its time"
    collector.stop()


class Circle:
    def __init__(self) -> None:
        self.own = self


async def test_circles_that_come_up_are_found_soon() -> None:
    collector = Collector(asyncio.get_running_loop(), lambda: 0)
    collector.start()
    for _ in range(100_000):
        Circle()
    assert sum(type(one) is Circle for one in gc.get_objects()) < 15_000
    collector.stop()


async def test_a_full_collection_waits_until_few_connections_are_open(
    monkeypatch: pytest.MonkeyPatch, full: Full
) -> None:
    monkeypatch.setattr(memory, "PERIOD", 0.01)
    connections = [memory.FEW_CONNECTIONS + 1]
    collector = Collector(asyncio.get_running_loop(), lambda: connections[0])
    collector.start()
    await asyncio.sleep(0.1)
    assert full.count == 1
    connections[0] -= 1
    await eventually(lambda: full.count >= 3)
    collector.stop()
    stopped = full.count
    await asyncio.sleep(0.05)
    assert full.count == stopped


async def test_a_full_collection_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, full: Full
) -> None:
    monkeypatch.setattr(memory, "PERIOD", 0.01)
    monkeypatch.setattr(memory, "LATEST", 0.1)
    collector = Collector(asyncio.get_running_loop(), lambda: 1_000_000)
    collector.start()
    await asyncio.sleep(0.05)
    assert full.count == 1
    await eventually(lambda: full.count >= 2)
    collector.stop()


async def test_a_running_sidecar_has_this_policy(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    async with mesh(tmp_path / "world") as one:
        env = {**one.app("a").env, "MESH_OUTBOUND_LISTEN": "127.0.0.1:0"}
        loaded = load_settings({}, {**env, "MESH_ADMIN_LISTEN": "127.0.0.1:0"}, None)
        running = asyncio.create_task(_alone(loaded, ready))
        await eventually(ready.exists)
        assert gc.get_freeze_count() > 10_000
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0
        assert gc.get_freeze_count() == 0


async def test_let_go_cuts_the_tie() -> None:
    class Transport(asyncio.Transport):
        def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
            self.protocol = protocol

    transport = Transport()
    transport.protocol = own = asyncio.Protocol()
    let_go(transport)
    assert transport.protocol is not own


# No garbage.


class Callers:
    """A process that opens connections, does something on each, and closes them."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def round(self, what: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n".encode())
        async with asyncio.timeout(30):
            assert await self._process.stdout.readline() == b"done\n"


@contextlib.asynccontextmanager
async def callers(address: TcpAddress, pem: Path, target: str) -> AsyncIterator[Callers]:
    """In a process of their own, so that their objects are not among those counted."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.many_callers", str(address), str(AT_ONCE), str(pem), target),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        yield Callers(process)
    finally:
        process.kill()
        await process.communicate()


def ours() -> Counter[str]:
    """Count our objects and TLS's; others may be of the simulator, which lives in this process."""
    names = (f"{type(one).__module__}.{type(one).__name__}" for one in gc.get_objects())
    parts = ("dstack_mesh.", "uvloop.loop._SSL", "uvloop.loop.SSL", "_ssl.")
    return Counter(name for name in names if name.startswith(parts) and ".sim." not in name)


async def at_rest(sidecar: Sidecar) -> None:
    """Wait until a sidecar has no connection any more, and nothing left to do for one."""
    for upstream in list(sidecar.worker.upstreams):
        upstream.transport.abort()
    listener = sidecar._listener
    await eventually(lambda: not sidecar.open_connections())
    await eventually(lambda: listener is None or not listener._handshakes)
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.timeout(240)  # 2,000 handshakes, of both sides, on a loaded machine
@pytest.mark.parametrize(
    ("direction", "what"),
    [
        ("inbound", "request"),
        ("inbound", "no request"),
        ("inbound", "reset"),
        ("inbound", "silent"),
        ("inbound", "nonsense"),
        ("inbound", "no certificate"),
        ("outbound", "request"),
        ("outbound", "no request"),
        ("outbound", "reset"),
        ("outbound", "nonsense"),
        ("outbound", "upgrade"),
    ],
)
async def test_connections_leave_no_garbage(tmp_path: Path, direction: str, what: str) -> None:
    """With the collector off the count of objects stays flat: the last reference frees them."""
    async with mesh(tmp_path) as one:
        a = await one.start("a", backend=False)
        b = await one.start("b")
        issued = one.world.kms.issue(new_app_id())
        pem = tmp_path / "caller.pem"
        pem.write_bytes(b"".join((issued.key_pem, *issued.chain_pem[:2])))
        address = one.inbound("b") if direction == "inbound" else one.outbound("a")
        sidecars = (a, b)
        rounds = MANY // AT_ONCE if what == "request" else 2
        async with callers(address, pem, one.app_id("b")) as many:
            await many.round(what)  # what is made once is made now
            for sidecar in sidecars:
                await at_rest(sidecar)
            gc.collect()
            gc.disable()
            before = ours()
            for _ in range(rounds):
                await many.round(what)
            for sidecar in sidecars:
                await at_rest(sidecar)
            left = ours() - before
            gc.enable()
        assert sum(left.values()) < AT_ONCE / 4, left
