"""What all connections of one event loop share: read buffer, sweep, limits of age."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any, Protocol

from dstack_mesh.relay.deadlines import Deadlines, Expiring, Timeouts

READ_BUFFER_BYTES = 256 * 1024

# Gateways cut a connection after 10 minutes without traffic and after 5 hours in all.
_MAX_IDLE = 8 * 60.0
_MAX_AGE = 60 * 60.0


class UpstreamConnection(Expiring, Protocol):
    """A connection in a worker's books."""

    transport: Any
    expires_at: float


class Worker:
    """One event loop's share of the data plane."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeouts: Timeouts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loop = loop
        self.clock = clock
        """Seconds, monotonic. Finer than the loop's own time, which may count milliseconds."""
        self.timeouts = timeouts
        self.buffer = memoryview(bytearray(READ_BUFFER_BYTES))
        """What TLS decrypts into; nothing may keep a view of it."""
        self.deadlines = Deadlines(loop, timeouts.tick(), clock)
        # A little less than our own inbound idle timeout, which the target's mesh likely has too:
        # the side that uses the connection should be the first to let it go.
        self.upstream_idle = min(timeouts.idle * 0.8, _MAX_IDLE)
        self.upstreams: set[UpstreamConnection] = set()

    def admit_upstream(self, upstream: UpstreamConnection) -> None:
        """Take a new connection into the books."""
        age = _MAX_AGE * random.uniform(0.9, 1.0)  # noqa: S311 - jitter, not a secret
        upstream.expires_at = self.clock() + age
        self.upstreams.add(upstream)
        self.deadlines.watch(upstream)

    def forget_upstream(self, upstream: UpstreamConnection) -> None:
        """Take a connection that is gone off the books."""
        self.upstreams.discard(upstream)
        self.deadlines.unwatch(upstream)

    def close(self) -> None:
        """End every connection to an upstream and stop the sweep."""
        for upstream in list(self.upstreams):
            upstream.transport.abort()
        self.deadlines.close()
