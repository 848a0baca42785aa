"""Reading what was sent and what came back by counting, and the notation of the request table."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOLD = re.compile(r"(?P<status>[0-9]{3})(?: (?P<code>[a-z_]+?_[a-z_]+))?|(?P<end>close|waits)")


@dataclass(frozen=True)
class Told:
    """What a client is told, in a table's fourth column."""

    answers: list[tuple[int, str]]
    """Statuses, each with the mesh's code or an empty text."""
    end: str
    """`close`, `waits`, or empty where the connection serves on."""

    @classmethod
    def parse(cls, text: str) -> Told:
        matches = list(_TOLD.finditer(text))
        if " ".join(match[0] for match in matches) != text or not matches:
            raise ValueError(f"not statuses with codes and an end: {text!r}")
        if any(match["end"] for match in matches[:-1]):
            raise ValueError(f"something behind the end: {text!r}")
        answers = [(int(m["status"]), m["code"] or "") for m in matches if m["status"]]
        return cls(answers, matches[-1]["end"] or "")


@dataclass(frozen=True)
class Sent:
    """One whole request as the mesh writes them: one length or one `chunked`, CRLF, no more."""

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes
    trailers: bytes
    raw: bytes


class NotCanonicalError(Exception):
    """The mesh must never write such bytes."""


def read_requests(data: bytes) -> tuple[list[Sent], bytes]:
    """Give the whole requests in `data`, and what of another one follows them."""
    whole: list[Sent] = []
    while (end := data.find(b"\r\n\r\n") + 4) > 3:
        lines = data[: end - 4].split(b"\r\n")
        method, target, version = lines[0].split(b" ")
        if version != b"HTTP/1.1":
            raise NotCanonicalError(lines[0])
        fields = []
        for line in lines[1:]:
            name, colon, value = line.partition(b": ")
            if not colon:
                raise NotCanonicalError(line)
            fields.append((name.lower(), value))
        taken = _read_body(data[end:], fields)
        if taken is None:
            break
        body, trailers, size = taken
        whole.append(Sent(method, target, fields, body, trailers, data[: end + size]))
        data = data[end + size :]
    return whole, data


def _read_body(data: bytes, fields: list[tuple[bytes, bytes]]) -> tuple[bytes, bytes, int] | None:
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    if (len(lengths) + len(codings)) > 1 or codings not in ([], [b"chunked"]):
        raise NotCanonicalError(fields)
    if codings:
        return _read_chunks(data)
    length = int(lengths[0]) if lengths else 0
    if lengths and lengths[0] != b"%d" % length:
        raise NotCanonicalError(lengths[0])
    return (data[:length], b"", length) if len(data) >= length else None


def _read_chunks(data: bytes) -> tuple[bytes, bytes, int] | None:
    body, at = b"", 0
    while (eol := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:eol], 16)
        if data[at:eol] != b"%x" % size:
            raise NotCanonicalError(data[at:eol])
        at = eol + 2
        if size == 0:
            if data.startswith(b"\r\n", at):
                return body, b"", at + 2
            end = data.find(b"\r\n\r\n", at)
            return (body, data[at : end + 2], end + 4) if end >= 0 else None
        if len(data) < at + size + 2:
            return None
        if data[at + size : at + size + 2] != b"\r\n":
            raise NotCanonicalError(data[at:])
        body += data[at : at + size]
        at += size + 2
    return None


def head_ends(data: bytes) -> list[int]:
    """Give where the blank line of each head in `data` begins; the last message may be broken."""
    whole, rest = read_requests(data)
    ends, at = [], 0
    for one in whole:
        ends.append(at + one.raw.index(b"\r\n\r\n") + 2)
        at += len(one.raw)
    if rest:
        ends.append(at + rest.index(b"\r\n\r\n") + 2)
    return ends


@dataclass(frozen=True)
class Got:
    """One response, as a client reads it."""

    status: int
    fields: dict[bytes, bytes]
    body: bytes

    @property
    def code(self) -> str:
        """The mesh's own code, or empty."""
        return self.fields.get(b"x-dstack-mesh-error", b"").decode()

    @property
    def by_the_origin(self) -> bool:
        return b"x-origin" in self.fields


def read_responses(data: bytes, methods: list[bytes]) -> tuple[list[Got], bytes]:
    """Give the whole responses in `data`, each with a length, and what follows them.

    `methods` are those of the requests that reach the origin: its answers come in their order.
    """
    whole: list[Got] = []
    waiting = list(methods)
    while (end := data.find(b"\r\n\r\n") + 4) > 3:
        status_line, *lines = data[: end - 4].split(b"\r\n")
        version, status, _ = status_line.split(b" ", 2)
        assert version == b"HTTP/1.1", status_line
        pairs = [line.partition(b": ") for line in lines]
        fields = {name.lower(): value for name, _, value in pairs}
        assert len(fields) == len(pairs), "an answer's field is there twice"
        length = int(fields[b"content-length"])
        if b"x-origin" in fields:
            assert waiting, "an answer without a request"
            if waiting.pop(0) == b"HEAD":
                length = 0
        if len(data) < end + length:
            break
        whole.append(Got(int(status), fields, data[end : end + length]))
        data = data[end + length :]
    return whole, data
