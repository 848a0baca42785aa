"""One request and its response: the way from a client's connection to an upstream's and back.

    start -> (connect) -> request head -> request body .. response head -> response body -> finish

Both bodies stream at once. Whoever reads faster than the other side can write is paused.
"""

from __future__ import annotations

from dstack_mesh.errors import (
    BadRequest,
    MeshError,
    UpstreamClosed,
    UpstreamProtocolError,
)
from dstack_mesh.relay.deadlines import NEVER
from dstack_mesh.relay.ending import Ending
from dstack_mesh.relay.interfaces import Client
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.wire.fields import MalformedError
from dstack_mesh.wire.request import RequestFields
from dstack_mesh.wire.request_line import RequestLine
from dstack_mesh.wire.translate import RequestBody, Response

_IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))
"""RFC 9110 9.2.2."""


class Exchange(Ending):
    """See the module. Recorded once, when it has ended."""

    __slots__ = ("_body",)

    def __init__(self, client: Client, line: RequestLine, fields: RequestFields) -> None:
        super().__init__(client, line, fields)
        self._body: RequestBody | None = None

    @property
    def handler(self) -> object:
        """What decided over it."""
        return self._client.handler()

    # The request's way up.

    def start(self, route: Route, rest: bytes) -> None:
        """Send the request on its way; `rest` is what was read of its body, where it has one."""
        self._route = route
        self.lane = route.lane
        if not self.request_done:
            self._body = RequestBody(self.fields, route.remove_trailers)
            self._early = rest
        upstream = route.lane.take(self.started)
        if upstream is not None:
            self._attach(upstream, self.started)
        else:
            self._wait(self.started)

    def request_data(self, data: bytes) -> None:
        """Take what the client sent after its head."""
        if self.upstream is None and not self.request_done:
            self._early += data
            self._client.pause_reading()
        elif self.upstream is not None and self._response is not None and self._response.switched:
            self.bytes_up += len(data)
            self.upstream.write(data)
        elif self.request_done:
            self._client.keep_for_later(data)
        else:
            self._send_body(data, b"")

    def _wait(self, now: float) -> None:
        self._waiting = True
        self._client.deadline = now + self.worker.timeouts.wait
        self._route.lane.wait(self)

    def connected(self, upstream: Upstream) -> None:
        """See `Waiter`."""
        self._waiting = False
        self.reached = self.worker.clock()
        self._attach(upstream, self.reached)

    def not_connected(self, error: MeshError) -> None:
        """See `Waiter`."""
        self._waiting = False
        self.fail(error)

    def _attach(self, upstream: Upstream, now: float) -> None:
        """Send the head, and what is there of the body, on a connection that is ready."""
        line = self.line
        self.upstream = upstream
        self.peer = upstream.peer
        self.reused = upstream.reused
        upstream.exchange = self
        self._response = Response(line.method, line.minor, self.fields.upgrade, self._route.rules)
        if self.request_done:
            upstream.write(self._route.head)
            self._client.deadline = now + self.worker.timeouts.response
            return
        self._client.deadline = NEVER
        early, self._early = self._early, b""
        self._send_body(early, self._route.head)
        if not self.ended and upstream.writable:
            self._client.resume_reading()

    def _send_body(self, data: bytes, head: bytes) -> None:
        assert self._body is not None  # noqa: S101 - there is one until the request is done
        assert self.upstream is not None  # noqa: S101 - callers have looked
        try:
            out, taken = self._body.feed(data)
        except MalformedError as error:
            self.fail(BadRequest(f"the request's body has {error}"))
            return
        self.bytes_up += len(out)
        self.upstream.write(head + out if head else out)
        if self._body.done:
            self.request_done = True
            self._request_ended()
            if taken < len(data):
                self._client.keep_for_later(data[taken:])

    def _request_ended(self) -> None:
        worker = self.worker
        if self._response is None or not self._response.status:
            self._client.deadline = worker.clock() + worker.timeouts.response

    # The response's way down.

    def response_data(self, data: bytes) -> None:
        """Take what the upstream sent."""
        response = self._response
        assert response is not None  # noqa: S101 - made when the upstream was attached
        if response.switched:
            self.bytes_down += len(data)
            self._client.write(data)
            return
        first = not response.status
        if first:
            response.keep_client = self._may_persist()
        try:
            out = response.feed(data)
        except MeshError as error:
            self.fail(error)
            return
        if response.status == 101 and not self.request_done:
            self.fail(UpstreamProtocolError("the protocol was switched before the request's end"))
            return
        self.bytes_down += len(out)
        if out:
            self._client.write(out)
        if first:
            self._first_answer(response)
        if response.done:
            self._finish(response)
        elif first and response.status == 101:
            self._tunnel()

    def _first_answer(self, response: Response) -> None:
        """Stop waiting for the response, or wait anew behind an interim one."""
        self._client.deadline = NEVER
        self.status = response.status
        if self.status:
            self.first_byte = 0.0 if response.done else self.worker.clock()
        elif self.request_done:
            self._request_ended()

    def _tunnel(self) -> None:
        assert self.upstream is not None  # noqa: S101 - its 101 has just come
        kept = self._client.begin_tunnel()
        if kept:
            self.bytes_up += len(kept)
            self.upstream.write(kept)
        if not self.upstream.writable:
            self._client.pause_reading()

    def upstream_lost(self, upstream: Upstream, exc: Exception | None) -> None:
        """See `ResponseSink`."""
        self.upstream = None
        response = self._response
        assert response is not None  # noqa: S101 - made when the upstream was attached
        if response.switched:
            self._end(keep=False)
            return
        if response.status:
            tail = response.end(upstream.clean_end and exc is None)
            if tail is None:
                self.fail(UpstreamClosed("the connection ended in the middle of the response"))
                return
            self._client.write(tail)
            self._finish(response)
        elif self._may_retry(upstream, response):
            self.fresh_only = True
            self._wait(self.worker.clock())
        else:
            self.fail(self._route.lane.connector.lost(exc))

    def _may_retry(self, upstream: Upstream, response: Response) -> bool:
        # An idle connection may be closed by its peer just as it is used. RFC 9110 9.2.2 lets a
        # proxy repeat only what is idempotent; a body is not kept, so only without one.
        return (
            upstream.reused
            and not self.fresh_only
            and not response.touched
            and self._body is None
            and self.line.method in _IDEMPOTENT
        )

    # Flow.

    def client_writable(self, writable: bool) -> None:
        """Pause or resume the response's source."""
        if self.upstream is not None:
            if writable:
                self.upstream.transport.resume_reading()
            else:
                self.upstream.transport.pause_reading()

    def upstream_writable(self, writable: bool) -> None:
        """See `ResponseSink`."""
        if writable:
            self._client.resume_reading()
        else:
            self._client.pause_reading()

    # The end.

    def ended_with(self, keep: bool) -> None:
        """See `Ending`."""
        self._client.exchange_ended(self, keep)
