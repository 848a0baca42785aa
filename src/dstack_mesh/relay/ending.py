"""How an exchange ends: by a whole response, an answer of the mesh's own, or an error."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from dstack_mesh.errors import ConnectTimeout, MeshError, ResponseTimeout
from dstack_mesh.relay.answers import Answer, problem, settled
from dstack_mesh.relay.interfaces import Client
from dstack_mesh.relay.lane import Route
from dstack_mesh.relay.record import Record
from dstack_mesh.relay.upstream import Upstream
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.request import RequestFields
from dstack_mesh.wire.request_line import RequestLine
from dstack_mesh.wire.translate import Response, behind_body


class Ending(Record):
    """The end of one exchange, which comes once; `relay.exchange` has the ways to it."""

    __slots__ = (
        "_client",
        "_early",
        "_response",
        "_route",
        "_task",
        "_waiting",
        "request_done",
        "upstream",
        "worker",
    )

    def __init__(self, client: Client, line: RequestLine, fields: RequestFields) -> None:
        self.worker: Worker = client.worker
        super().__init__(line, fields, self.worker.clock())
        self._client = client
        self.request_done = not fields.has_body
        self.upstream: Upstream | None = None
        self._route: Route
        self._response: Response | None = None
        self._early = b""
        """What came of the body before there was a connection to send it on."""
        self._waiting = False
        """Whether it waits for that connection."""
        self._task: asyncio.Task[None] | None = None

    def answer(self, answer: Answer, rest: bytes = b"") -> None:
        """Answer from the mesh itself; `rest` is what was read of the body, where there is one."""
        if not self.request_done and self._response is None:
            # A body that is here whole: refusing it need not cost the client its connection.
            beyond = behind_body(self.fields, self._early + rest)
            if beyond is not None:
                self.request_done = True
                if beyond:
                    self._client.keep_for_later(beyond)
        self.status, self.code = answer.status, answer.code
        self.detail, self.request_id = answer.detail, answer.request_id
        keep = self._may_persist()
        if not keep:
            connection = b"Connection: close\r\n"
        elif self.line.minor == 0:
            connection = b"Connection: keep-alive\r\n"
        else:
            connection = b""
        out = answer.render(self.line.method, connection)
        self.bytes_down += len(out)
        self._client.write(out)
        self._end(keep=keep)

    def answer_later(self, answer: Coroutine[None, None, Answer], rest: bytes = b"") -> None:
        """Answer with what `answer` gives, for what cannot be told at once; `rest`: see above."""
        if not self.request_done:
            self._early = rest

        async def wait() -> None:
            given = await settled(answer, self.fields.request_id.decode("latin-1"))
            if given is not None and not self.ended:
                self.answer(given)
            elif not self.ended:
                self._cut()

        self._task = self.worker.loop.create_task(wait())

    def fail(self, error: MeshError) -> None:
        """Answer with `error`, or cut the connection where an answer is no longer possible."""
        if self.status:
            self.code, self.detail = error.code, error.detail
            self._cut()
            return
        self._drop_upstream()
        self.answer(problem(error, self.fields.request_id.decode("latin-1")))

    def timed_out(self) -> None:
        """Fail for want of a connection, or of a response."""
        if self._waiting:
            seconds = self.worker.timeouts.connect
            self.fail(
                ConnectTimeout(
                    f"no connection became free within {seconds:g} s (MESH_CONNECT_TIMEOUT)"
                )
            )
            return
        seconds = self.worker.timeouts.response
        self.fail(
            ResponseTimeout(
                f"no response began within {seconds:g} s of the request's end "
                "(MESH_RESPONSE_TIMEOUT)"
            )
        )

    def client_lost(self) -> None:
        """Let go of everything: the client's connection is gone."""
        if not self.ended:
            # What it sent last through a tunnel is still on its way.
            self._drop_upstream(flush=self._response is not None and self._response.switched)
            self._end(keep=False)

    def _may_persist(self) -> bool:
        return (
            self.request_done
            and self.fields.persists(self.line.minor)
            and self._client.may_persist()
        )

    def _finish(self, response: Response) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.exchange = None
            if response.keep_upstream and self.request_done:
                if not self._client.writable:
                    upstream.transport.resume_reading()
                self.finished = self.worker.clock()
                self._route.lane.release(upstream, self.finished)
            else:
                upstream.transport.abort()
        self._end(keep=response.keep_client)

    def _cut(self) -> None:
        self._drop_upstream()
        self._client.cut()
        self._end(keep=False)

    def _drop_upstream(self, *, flush: bool = False) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.exchange = None
            if flush:
                upstream.close()
            else:
                upstream.transport.abort()

    def _end(self, *, keep: bool) -> None:
        if not self.ended:
            self.ended = True
            if not self.finished:
                self.finished = self.worker.clock()
            self.ended_with(keep)

    def ended_with(self, keep: bool) -> None:
        """Have it recorded, and the client's connection go on where `keep` says so."""
        raise NotImplementedError
