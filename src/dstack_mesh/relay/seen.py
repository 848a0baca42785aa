"""What a connection remembers of its last head."""

from __future__ import annotations

from typing import Generic

from dstack_mesh.relay.interfaces import P
from dstack_mesh.relay.lane import Route
from dstack_mesh.wire.request_line import RequestLine


class Seen(Generic[P]):
    """A head, and what was made of it: clients repeat themselves, wholly or but for the target.

    Only heads of HTTP/1.1 in origin-form, whose field lines mean the same whatever the first is.
    """

    __slots__ = ("block", "head", "line", "plan", "route")

    def __init__(
        self, head: bytes, line: RequestLine, block: bytes, plan: P, route: Route | None
    ) -> None:
        self.head = head
        self.line = line
        self.block = block
        """The field lines."""
        self.plan = plan
        self.route = route
        """Where it went; None where the mesh itself gave the answer."""
