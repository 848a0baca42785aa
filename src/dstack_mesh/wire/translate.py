"""Whole messages from one connection's bytes to the other's: framing removed and put on anew."""

from __future__ import annotations

import re

from dstack_mesh.errors import UpstreamProtocolError
from dstack_mesh.wire.body import (
    CloseDecoder,
    Decoder,
    LengthDecoder,
    chunk,
    decoder,
    last_chunk,
)
from dstack_mesh.wire.fields import MalformedError, has_bare_lf
from dstack_mesh.wire.framing import Framing, response_framing
from dstack_mesh.wire.limits import MAX_HEAD_BYTES, MAX_INTERIM_RESPONSES
from dstack_mesh.wire.memo import BlockMemo
from dstack_mesh.wire.request import RequestFields
from dstack_mesh.wire.response import (
    ResponseFields,
    StatusLine,
    parse_response_fields,
    parse_status_line,
    switches_to,
)


class RequestBody:
    """A request's body on its way to an HTTP/1.1 server."""

    __slots__ = ("_chunked", "_decoder")

    def __init__(self, fields: RequestFields, remove_trailers: frozenset[bytes]) -> None:
        self._decoder: Decoder = decoder(
            fields.framing, fields.length, remove_trailers | fields.nominated
        )
        self._chunked = fields.framing is Framing.CHUNKED

    @property
    def done(self) -> bool:
        """Whether the body is complete."""
        return self._decoder.done

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Give the bytes to send and the count of bytes taken. Raises `MalformedError`."""
        out, taken = self._decoder.feed(data)
        if self._chunked:
            out = chunk(out)
            if self._decoder.done:
                out += last_chunk(self._decoder.trailers)
        return out, taken


def behind_body(fields: RequestFields, data: bytes) -> bytes | None:
    """Give what follows a request's body that `data` holds whole; None where it does not."""
    body = RequestBody(fields, frozenset())
    try:
        _, taken = body.feed(data)
    except MalformedError:
        return None
    return data[taken:] if body.done else None


class ResponseHead:
    """What a response's head says, and what of it goes on. Never changed once made."""

    __slots__ = ("fields", "keeps", "line", "plain", "text")

    def __init__(self, text: bytes, line: StatusLine, fields: ResponseFields) -> None:
        self.text = text
        """As it came."""
        self.line = line
        self.fields = fields
        self.keeps = fields.persists(line.minor)
        """Whether the server keeps its connection open."""
        self.plain = b""
        """The head that goes on where the body's length is declared and nothing is to be added."""
        may_have_body = line.status >= 200 and line.status not in (204, 205, 304)
        if may_have_body and fields.declared is Framing.LENGTH:
            self.plain = b"HTTP/1.1 %b\r\n%b\r\n" % (line.rest, fields.forwarded)


class ResponseRules:
    """What becomes of response fields in one direction: names to take out, and one to mark."""

    __slots__ = ("_memo", "_remote_errors", "last_plain", "remove")

    def __init__(self, *, remote_errors: bool) -> None:
        """`remote_errors`: keep another mesh's error header, marked as such, or take it out."""
        self._remote_errors = remote_errors
        self.remove = frozenset((b"x-dstack-mesh-error",))
        self.last_plain: ResponseHead | None = None
        """The ordinary head that came last: servers answer the same again."""
        self._memo: BlockMemo[ResponseHead] = BlockMemo(self._parse)

    def head(self, text: bytes) -> ResponseHead:
        """Parse a head, blank line included. Raises `UpstreamProtocolError`."""
        return self._memo.get(text)

    def _parse(self, text: bytes) -> ResponseHead:
        eol = text.find(b"\r\n")
        line = parse_status_line(text[:eol])
        fields = parse_response_fields(text[eol + 2 : -2], line.minor, self.remove)
        if self._remote_errors:
            for name, value in fields.removed:
                if name == b"x-dstack-mesh-error" and _is_error_code(value):
                    fields.forwarded += b"x-dstack-mesh-error: %b; remote\r\n" % value
        return ResponseHead(text, line, fields)


class Response:
    """The responses to one request, interim ones included, on their way to the client."""

    __slots__ = (
        "_client_minor",
        "_decoder",
        "_interims",
        "_method",
        "_offered",
        "_partial",
        "_rechunk",
        "_rules",
        "done",
        "keep_client",
        "keep_upstream",
        "status",
        "switched",
        "touched",
    )

    def __init__(
        self, method: bytes, client_minor: int, offered: bytes, rules: ResponseRules
    ) -> None:
        self._method = method
        self._client_minor = client_minor
        self._offered = offered
        self._rules = rules
        self._partial = b""
        self._interims = 0
        self._decoder: Decoder | None = None
        self._rechunk = False
        self.touched = False
        """Whether one byte of an answer has come."""
        self.status = 0
        """The final response's status, or 101; 0 until its head is complete."""
        self.switched = False
        """Whether the connection has changed its protocol (101)."""
        self.done = False
        self.keep_client = True
        """Set before the final head comes; turned off where only closing can end the body."""
        self.keep_upstream = False

    def feed(self, data: bytes) -> bytes:
        """Give the bytes to send for what was read. Raises `UpstreamProtocolError`."""
        if self._decoder is not None:
            return self._body(data, self._decoder)
        self.touched = True
        if not self._partial and self._may_be_plain():
            last = self._rules.last_plain
            if last is not None and data.startswith(last.text):
                return self._plain(last, data[len(last.text) :])
        seen = len(self._partial)
        text = self._partial + data if seen else data
        out = b""
        while (end := text.find(b"\r\n\r\n", max(0, seen - 3))) >= 0:
            if end + 4 > MAX_HEAD_BYTES:
                raise UpstreamProtocolError(_HEAD_TOO_LARGE)
            head = self._rules.head(text[: end + 4])
            text = text[end + 4 :]
            if head.plain and self._may_be_plain():
                self._rules.last_plain = head
                return out + self._plain(head, text)
            seen = 0
            line, fields = head.line, head.fields
            if line.status >= 200:
                self._partial = b""
                return out + self._final(head, text)
            if line.status == 101:
                self._partial = b""
                return out + self._switch(line, fields) + text
            out += self._interim(line, fields)
        self._hold(text, seen)
        return out

    def _may_be_plain(self) -> bool:
        """Tell whether a head needs nothing added, and its body is as it declares."""
        return self._client_minor == 1 and self.keep_client and self._method != b"HEAD"

    def end(self, clean: bool) -> bytes | None:
        """Give the last bytes to send now that the connection has ended; `None`: broken off."""
        if clean and isinstance(self._decoder, CloseDecoder):
            self.done = True
            return last_chunk(b"") if self._rechunk else b""
        return None

    def _hold(self, text: bytes, seen: int) -> None:
        if len(text) > MAX_HEAD_BYTES:
            raise UpstreamProtocolError(_HEAD_TOO_LARGE)
        start = b"HTTP/1."
        if text[: len(start)] != start[: len(text)]:
            raise UpstreamProtocolError("the answer is not HTTP/1")
        if has_bare_lf(text, seen):
            raise UpstreamProtocolError("the response has a bare LF in its head")
        self._partial = text

    def _interim(self, line: StatusLine, fields: ResponseFields) -> bytes:
        self._interims += 1
        if self._interims > MAX_INTERIM_RESPONSES:
            raise UpstreamProtocolError(f"more than {MAX_INTERIM_RESPONSES} interim responses")
        _checked_framing(self._method, line, fields)
        if self._client_minor == 0:
            return b""  # RFC 9110 15.2: an HTTP/1.0 client knows no 1xx
        return b"HTTP/1.1 %b\r\n%b\r\n" % (line.rest, _without_length(fields))

    def _switch(self, line: StatusLine, fields: ResponseFields) -> bytes:
        _checked_framing(self._method, line, fields)
        if line.minor == 0:
            raise UpstreamProtocolError("the response switches protocols in HTTP/1.0")
        if not switches_to(self._offered, fields.upgrade):
            raise UpstreamProtocolError(
                "the response switches to a protocol that was not asked for"
            )
        self.status = 101
        self.switched = True
        return b"HTTP/1.1 %b\r\n%bConnection: Upgrade\r\nUpgrade: %b\r\n\r\n" % (
            line.rest,
            _without_length(fields),
            fields.upgrade,
        )

    def _plain(self, head: ResponseHead, rest: bytes) -> bytes:
        """Let an ordinary final response go on."""
        self._partial = b""
        self.status = head.line.status
        self.keep_upstream = head.keeps
        length = head.fields.length
        if len(rest) == length:
            self.done = True
            return head.plain + rest
        if length == 0:
            self._end(excess=True)
            return head.plain
        self._decoder = LengthDecoder(length)
        return head.plain + self._body(rest, self._decoder) if rest else head.plain

    def _final(self, head: ResponseHead, rest: bytes) -> bytes:
        line, fields = head.line, head.fields
        framing = _checked_framing(self._method, line, fields)
        self.status = line.status
        self.keep_upstream = framing is not Framing.CLOSE and head.keeps
        own = b""
        if framing >= Framing.CHUNKED:
            self._rechunk = self._client_minor == 1
            if self._rechunk:
                own = b"Transfer-Encoding: chunked\r\n"
            else:
                self.keep_client = False
        elif fields.declared is Framing.CHUNKED and self._client_minor == 1:
            own = b"Transfer-Encoding: chunked\r\n"
        if not self.keep_client:
            own += b"Connection: close\r\n"
        elif self._client_minor == 0:
            own += b"Connection: keep-alive\r\n"
        forwarded = _without_length(fields) if line.status == 204 else fields.forwarded
        out = b"HTTP/1.1 %b\r\n%b%b\r\n" % (line.rest, forwarded, own)
        if framing is Framing.NONE:
            self._end(excess=bool(rest))
            return out
        self._decoder = decoder(framing, fields.length, self._rules.remove | fields.nominated)
        return out + self._body(rest, self._decoder) if rest else out

    def _body(self, data: bytes, body: Decoder) -> bytes:
        try:
            out, taken = body.feed(data)
        except MalformedError as error:
            raise UpstreamProtocolError(f"the response's body has {error}") from error
        if self._rechunk:
            out = chunk(out)
            if body.done:
                out += last_chunk(body.trailers)
        if body.done:
            self._end(excess=taken < len(data))
        return out

    def _end(self, *, excess: bool) -> None:
        self.done = True
        if excess:
            # bytes that answer no request: nothing on that connection can be believed any more.
            self.keep_upstream = False


def _checked_framing(method: bytes, line: StatusLine, fields: ResponseFields) -> Framing:
    try:
        return response_framing(method, line.status, fields.declared, fields.length)
    except MalformedError as error:
        raise UpstreamProtocolError(f"the upstream sent {error}") from error


def _without_length(fields: ResponseFields) -> bytes:
    """Give the fields of a response that may not declare a length, not even 0 (RFC 9110 8.6)."""
    if fields.declared is None:
        return fields.forwarded
    return _content_length(b"", fields.forwarded)


_content_length = re.compile(rb"^content-length:[^\n]*+\n", re.IGNORECASE | re.MULTILINE).sub
_is_error_code = re.compile(rb"[a-z_]++").fullmatch
_HEAD_TOO_LARGE = f"the response's head is over {MAX_HEAD_BYTES} bytes"
