"""What is known of an exchange: for metrics, the access log and the journal."""

from __future__ import annotations

from dstack_mesh.model import PeerIdentity
from dstack_mesh.relay.lane import Lane
from dstack_mesh.relay.upstream import ResponseSink
from dstack_mesh.wire.request import RequestFields
from dstack_mesh.wire.request_line import RequestLine


class Record(ResponseSink):
    """An exchange as it is recorded. Times are the worker's, in seconds; 0 is never."""

    __slots__ = (
        "bytes_down",
        "bytes_up",
        "code",
        "detail",
        "fields",
        "finished",
        "first_byte",
        "lane",
        "line",
        "peer",
        "reached",
        "request_id",
        "reused",
        "started",
        "status",
    )

    def __init__(self, line: RequestLine, fields: RequestFields, started: float) -> None:
        super().__init__()
        self.line = line
        self.fields = fields
        self.started = started
        self.reached = 0.0
        """When the connection that was waited for was there."""
        self.first_byte = 0.0
        """When the response began, where that was not its end too."""
        self.finished = 0.0
        self.status = 0
        self.code = ""
        """The mesh's own error code, or empty."""
        self.detail = self.request_id = ""
        """What the error's reader was told; both are empty where there was no error."""
        self.reused: bool | None = None
        """Whether the connection had been used before; None for none."""
        self.lane: Lane | None = None
        """Where it went; None where the mesh itself answered."""
        self.peer: PeerIdentity | None = None
        self.bytes_up = 0
        self.bytes_down = 0
