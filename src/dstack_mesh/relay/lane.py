"""The connections to one destination, and who waits for one.

A request takes the connection used last. Where none is idle it waits in line, and a connection is
opened; whichever comes first, that one or another request's, goes to whoever has waited longest.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Final

from dstack_mesh.errors import ConnectFailed, MeshError
from dstack_mesh.log import event
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.tally import PeerTally, Tally
from dstack_mesh.relay.upstream import Connector, Upstream, Waiter
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.translate import ResponseRules

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 1024
"""To one destination. A gateway takes 2,000 for an app, from all of its callers."""

MAX_ATTEMPTS: Final = 64
"""Connections that are being opened at once; one, where the last attempts have all failed."""

_UNHEALTHY: Final = 3
"""Attempts that failed in a row."""

_WARM_SECONDS: Final = 60.0
"""For so long behind the last request one connection is kept, through renewals and old age."""


class Lane:
    """See the module."""

    __slots__ = (
        "_attempts",
        "_closed",
        "_failures",
        "_last_taken",
        "_tasks",
        "_waiting",
        "connector",
        "idle",
        "open",
        "peer",
        "retired",
        "tally",
        "worker",
    )

    def __init__(
        self,
        worker: Worker,
        connector: Connector,
        tally: Tally | None = None,
        peer: PeerTally | None = None,
    ) -> None:
        self.worker = worker
        self.connector = connector
        self.tally = tally
        """Where exchanges that go this way are counted; None: where their listener's are."""
        self.peer = peer
        """Where those that go to this peer are counted; None where it is no app."""
        self.idle: list[Upstream] = []
        """The one used last at the end."""
        self.open = 0
        """Connections, idle and busy."""
        self.retired = False
        """Whether the pool has let go of the lane: whoever remembers it should ask again."""
        self._waiting: deque[Waiter] = deque()
        self._attempts = 0
        self._closed = False
        self._failures = 0
        self._last_taken = -NEVER
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_use(self) -> bool:
        """Whether there are connections, or there will be."""
        return self.open > 0 or self._attempts > 0

    def take(self, now: float) -> Upstream | None:
        """Give an idle connection that may be used, if there is one and nobody waits."""
        self._last_taken = now
        idle = self.idle
        if not idle:
            return None
        generation = self.connector.generation()
        while idle:
            upstream = idle.pop()
            upstream.deadline = NEVER
            if upstream.usable(now, generation):
                upstream.reused = True
                return upstream
            upstream.close()
        return None

    def wait(self, waiter: Waiter) -> None:
        """Have `waiter` told of a connection, or of why there is none."""
        waiting = self._waiting
        # Where all connections are taken for long, those that gave up must not pile up.
        while waiting and waiting[0].ended:
            waiting.popleft()
        waiting.append(waiter)
        self._open_more()

    def release(self, upstream: Upstream, now: float) -> None:
        """Take back a connection whose exchange ended well, and was not the last of it."""
        if not upstream.usable(now, self.connector.generation()) or self.retired:
            upstream.close()
            self._keep_warm()
            return
        upstream.reused = True
        if self._waiting:
            waiter = self._next_waiter(fresh=False)
            if waiter is not None:
                waiter.connected(upstream)
                return
        upstream.deadline = min(now + self.worker.upstream_idle, upstream.expires_at)
        self.idle.append(upstream)
        if self._waiting:
            self._open_more()

    def forget(self, upstream: Upstream) -> None:
        """Drop a connection that is gone."""
        if upstream.admitted:
            self.open -= 1
            self.connector.forgotten(upstream)
        self.worker.forget_upstream(upstream)
        if upstream.exchange is None and upstream in self.idle:
            self.idle.remove(upstream)
            if self.worker.clock() >= upstream.expires_at:
                self._keep_warm()
        if self._waiting:
            self._open_more()

    def drain(self) -> None:
        """Close the idle connections that may not be used any more."""
        now = self.worker.clock()
        generation = self.connector.generation()
        stale = [one for one in self.idle if not one.usable(now, generation)]
        for one in stale:
            self.idle.remove(one)
            one.close()
        if stale:
            self._keep_warm()

    def close(self) -> None:
        """Give up what is being opened, and open nothing any more."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()

    # Opening.

    def _open_more(self) -> None:
        """Open as many connections as there are requests that wait, within the limits."""
        most = MAX_ATTEMPTS if self._failures < _UNHEALTHY else 1
        wanted = min(most, len(self._waiting))
        while self._attempts < wanted and self._has_room():
            self._open_one()
        if self._attempts < wanted and self.idle:
            # Who waits here wants a connection that was never used, and this one has its place.
            self.idle.pop(0).close()

    def _has_room(self) -> bool:
        return self.open + self._attempts < MAX_CONNECTIONS and not self._closed

    def _keep_warm(self) -> None:
        """Have a connection ready for the next request, where one is to be expected."""
        lately = self.worker.clock() - self._last_taken < _WARM_SECONDS
        needless = self.idle or self._attempts or self.retired or self._failures
        if lately and not needless and self._has_room():
            self._open_one()

    def _open_one(self) -> None:
        self._attempts += 1
        task = self.worker.loop.create_task(self._attempt())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attempt(self) -> None:
        failure: MeshError | None = None
        upstream: Upstream | None = None
        try:
            upstream = await self.connector.connect(self)
            if upstream.gone:
                failure = self.connector.lost(upstream.failure)
        except MeshError as refusal:
            failure = refusal
        except Exception as error:
            event(log, logging.ERROR, "connect_fault", error=repr(error))
            failure = ConnectFailed("the connection could not be opened; see the log")
        finally:
            self._attempts -= 1
        if failure is not None:
            self._failed(failure)
        elif upstream is not None:
            self._failures = 0
            self._opened(upstream)

    def _opened(self, upstream: Upstream) -> None:
        waiter = self._next_waiter(fresh=True)
        if waiter is not None:
            waiter.connected(upstream)
        elif upstream.transport.is_closing():
            upstream.close()  # without another try: the peer would do the same to that
        else:
            self.release(upstream, self.worker.clock())
        if self._waiting:
            self._open_more()

    def _failed(self, error: MeshError) -> None:
        """Tell who has waited longest; where attempts fail again and again, all that wait."""
        self._failures += 1
        if self._failures < _UNHEALTHY:
            waiter = self._next_waiter(fresh=True)
            if waiter is not None:
                waiter.not_connected(error)
        else:
            # Who comes to wait meanwhile is for the next attempt.
            waiting, self._waiting = self._waiting, deque()
            for one in waiting:
                if not one.ended:
                    one.not_connected(error)
        self._open_more()

    def _next_waiter(self, *, fresh: bool) -> Waiter | None:
        """Give who has waited longest, of those for whom the connection will do."""
        waiting = self._waiting
        passed: list[Waiter] = []
        found: Waiter | None = None
        while waiting and found is None:
            waiter = waiting.popleft()
            if waiter.ended:
                continue
            if waiter.fresh_only and not fresh:
                passed.append(waiter)
            else:
                found = waiter
        waiting.extendleft(reversed(passed))
        return found


class Route:
    """Where a request goes and how it is to look there."""

    __slots__ = ("head", "lane", "remove_trailers", "rules")

    def __init__(
        self, lane: Lane, head: bytes, rules: ResponseRules, remove_trailers: frozenset[bytes]
    ) -> None:
        self.lane = lane
        self.head = head
        """The complete head to send, blank line included."""
        self.rules = rules
        self.remove_trailers = remove_trailers
