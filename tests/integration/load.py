"""A modest load of numbered requests, and what became of each."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from dstack_mesh.model import AppId, TcpAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.messages import Request, Response
from tests.integration.harness import Client, eventually, request

PAUSE = 0.003
"""Seconds that a client thinks between two requests."""


class Counted:
    """A backend's path `/n`: notes the number of each request that it has worked on."""

    def __init__(self, *backends: Backend) -> None:
        self.seen: Counter[int] = Counter()
        for backend in backends:
            backend.on("/n", self._answer)

    async def _answer(self, got: Request) -> Response:
        async for _ in got.body:
            pass
        self.seen[int(got.query)] += 1
        await asyncio.sleep(0.002)
        return Response(200, [], got.query.encode())


@dataclass
class Load:
    """`clients` connections with one request after the other on each, until stopped."""

    address: TcpAddress
    target: AppId
    method: str = "GET"
    clients: int = 6
    answered: list[int] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    """The mesh's own answers, by code, `; remote` included."""

    broken: list[int] = field(default_factory=list)
    """Numbers of requests whose connection ended without an answer."""

    refused: int = 0
    """Connections that did not come about: nothing was sent."""

    connections: int = 0
    _number: int = 0
    _stopped: bool = False

    async def more(self, count: int = 60) -> None:
        """Wait until so many more have been answered well."""
        goal = len(self.answered) + count
        await eventually(lambda: len(self.answered) >= goal, 15)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self.clients):
                group.create_task(self._client())

    def stop(self) -> None:
        self._stopped = True

    async def _client(self) -> None:
        while not self._stopped:
            try:
                async with Client.connect(self.address) as client:
                    self.connections += 1
                    await self._use(client)
            except ConnectionError:
                self.refused += 1
                await asyncio.sleep(10 * PAUSE)

    async def _use(self, client: Client) -> None:
        while not self._stopped:
            self._number += 1
            number = self._number
            body = b"x" if self.method == "POST" else b""
            head = [("x-dstack-target-app", self.target)]
            try:
                await client.send(request(self.method, f"/n?{number}", head, body))
                answer = await client.answer(self.method)
            except (OSError, EOFError):
                self.broken.append(number)
                return
            if answer.error:
                self.codes[answer.error] += 1
            else:
                assert answer.body == str(number).encode(), "another request's answer"
                self.answered.append(number)
            if answer.get(b"connection") == b"close":
                return
            await asyncio.sleep(PAUSE)


@contextlib.asynccontextmanager
async def load(one: Load) -> AsyncIterator[Load]:
    """Keep it up for the block, from when it is under way."""
    task = asyncio.create_task(one.run())
    try:
        await one.more()
        yield one
        one.stop()
        async with asyncio.timeout(15):
            await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def unanswered(one: Load, counted: Counted) -> set[int]:
    """Give the numbers that a backend has worked on and whose client got no answer of it."""
    return set(counted.seen) - set(one.answered)
