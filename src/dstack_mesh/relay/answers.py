"""Responses that the mesh itself gives."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Coroutine
from http import HTTPStatus

import msgspec

from dstack_mesh.errors import MeshError
from dstack_mesh.log import event

log = logging.getLogger(__name__)

_request_id = re.compile(
    rb"^x-request-id:[ \t]*+([!-~]{1,200})[ \t]*+\r\n", re.IGNORECASE | re.MULTILINE
).search


class Answer:
    """A whole response with a body in memory."""

    __slots__ = ("body", "code", "detail", "fields", "request_id", "status")

    def __init__(
        self, status: int, body: bytes, content_type: str, *, fields: bytes = b"", code: str = ""
    ) -> None:
        self.status = status
        self.body = body
        self.fields = b"Content-Type: %b\r\n%b" % (content_type.encode("ascii"), fields)
        self.code = code
        """The mesh's error code, or empty."""
        self.detail = ""
        self.request_id = ""
        """What the problem's reader is told, for logs too; empty where this is no problem."""

    def render(self, method: bytes, connection: bytes) -> bytes:
        """Give the response's bytes; `connection` is its `Connection` field line, or empty."""
        return b"HTTP/1.1 %d %b\r\n%bContent-Length: %d\r\n%b\r\n%b" % (
            self.status,
            HTTPStatus(self.status).phrase.encode("ascii"),
            self.fields,
            len(self.body),
            connection,
            b"" if method == b"HEAD" else self.body,
        )


def json_answer(status: int, value: object) -> Answer:
    """Make an `application/json` answer."""
    return Answer(status, msgspec.json.encode(value) + b"\n", "application/json")


def problem(error: MeshError, request_id: str) -> Answer:
    """Make the problem details answer for `error` (RFC 9457); an empty id is made up."""
    request_id = request_id or secrets.token_hex(16)
    body = {
        "type": "about:blank",
        "status": error.status,
        "title": error.title,
        "detail": error.detail,
        "code": error.code,
        "request_id": request_id,
    }
    fields = b"x-dstack-mesh-error: %b\r\n" % error.code.encode("ascii")
    if error.retry_after is not None:
        fields += b"Retry-After: %d\r\n" % error.retry_after
    answer = Answer(
        error.status,
        msgspec.json.encode(body) + b"\n",
        "application/problem+json",
        fields=fields,
        code=error.code,
    )
    answer.detail, answer.request_id = error.detail, request_id
    return answer


async def settled(answer: Coroutine[None, None, Answer], request_id: str) -> Answer | None:
    """Give what `answer` gives, or the answer to its error; None for a fault, which is logged."""
    try:
        return await answer
    except MeshError as refusal:
        return problem(refusal, request_id)
    except Exception as error:
        event(log, logging.ERROR, "answer_fault", error=repr(error))
        return None


def find_request_id(head: bytes) -> bytes:
    """Find a request id in a head that could not be parsed as a whole; empty for none."""
    match = _request_id(head)
    return match[1] if match else b""
