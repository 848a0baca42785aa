"""Faults that a test switches on: an answer that fails, comes late, or is no answer at all."""

from __future__ import annotations

import asyncio

from dstack_mesh.sim.messages import Answer, Raw, Response


class Faults:
    """Mixed into a part that answers HTTP; `fault()` says what to do instead of the real thing."""

    failing: bool = False
    """Every request gets `failure()` until this is false again."""

    delay: float = 0.0
    """Seconds to wait before each answer."""

    nonsense: bytes | None = None
    """Sent as they are instead of any answer, then the connection ends; `b""` only ends it."""

    _to_fail: int = 0

    def fail_next(self, count: int = 1) -> None:
        """Let the next `count` requests fail, and the ones after them succeed."""
        self._to_fail = count

    def failure(self) -> Response:
        """The failing answer; a part overrides it with what its model would say."""
        return Response(500, [("content-type", "text/plain")], b"simulated failure\n")

    async def fault(self) -> Answer | None:
        """Wait as `delay` says, and return the answer to give, or None for the real one."""
        if self.delay:
            await asyncio.sleep(self.delay)
        if self.nonsense is not None:
            return Raw(self.nonsense)
        if self._to_fail > 0:
            self._to_fail -= 1
            return self.failure()
        return self.failure() if self.failing else None
