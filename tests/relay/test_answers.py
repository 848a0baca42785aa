from __future__ import annotations

import asyncio
import json
import logging

import h11
import pytest

from dstack_mesh.errors import BadRequest, MeshError, Overloaded, PolicyDenied
from dstack_mesh.relay.answers import Answer, find_request_id, json_answer, problem, settled


def read(data: bytes, method: str = "GET") -> tuple[int, dict[bytes, bytes], bytes]:
    """Read a response the way an independent strict reader does; all of `data` is it."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    head = parser.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(event := parser.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert parser.trailing_data[0] == b""
    names = [name for name, _ in head.headers]
    assert len(set(names)) == len(names)
    return head.status_code, dict(head.headers), body


def test_an_answer_as_bytes() -> None:
    answer = Answer(405, b"no\n", "text/plain", fields=b"Allow: GET\r\n")
    assert answer.render(b"POST", b"Connection: close\r\n") == (
        b"HTTP/1.1 405 Method Not Allowed\r\nContent-Type: text/plain\r\nAllow: GET\r\n"
        b"Content-Length: 3\r\nConnection: close\r\n\r\nno\n"
    )
    assert answer.code == ""


def test_head_gets_the_length_and_no_body() -> None:
    answer = Answer(200, b"OK\n", "text/plain")
    get, head = answer.render(b"GET", b""), answer.render(b"HEAD", b"")
    assert get == head + b"OK\n"
    assert read(head, "HEAD")[1][b"content-length"] == b"3"


def test_json() -> None:
    status, fields, body = read(json_answer(503, {"ready": False}).render(b"GET", b""))
    assert (status, json.loads(body)) == (503, {"ready": False})
    assert fields[b"content-type"] == b"application/json"


def test_a_problem_is_the_contracts() -> None:
    answer = problem(PolicyDenied('no rule "x"\r\nmatched'), "id-7")
    status, fields, body = read(answer.render(b"GET", b""))
    assert (status, answer.code) == (403, "policy_denied")
    assert fields == {
        b"content-type": b"application/problem+json",
        b"x-dstack-mesh-error": b"policy_denied",
        b"content-length": b"%d" % len(body),
    }
    assert json.loads(body) == {
        "type": "about:blank",
        "status": 403,
        "title": PolicyDenied.title,
        "detail": 'no rule "x"\r\nmatched',
        "code": "policy_denied",
        "request_id": "id-7",
    }


def test_a_problem_that_passes_says_when_to_come_again() -> None:
    answer = problem(Overloaded("full"), "")
    _, fields, _ = read(answer.render(b"GET", b""))
    assert fields[b"retry-after"] == b"%d" % (Overloaded.retry_after or 0)


def test_a_request_without_an_id_gets_one_of_its_own() -> None:
    ids = [json.loads(problem(BadRequest("x"), "").body)["request_id"] for _ in range(2)]
    assert all(ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize("error", MeshError.__subclasses__(), ids=lambda one: one.code)
def test_every_error_can_be_answered(error: type[MeshError]) -> None:
    status, fields, body = read(problem(error("why"), "").render(b"GET", b""))
    assert status == error.status == json.loads(body)["status"]
    assert fields[b"x-dstack-mesh-error"] == error.code.encode()


async def _fails(error: BaseException) -> Answer:
    raise error


async def test_an_answer_that_comes_later() -> None:
    late = json_answer(200, {})

    async def give() -> Answer:
        return late

    assert await settled(give(), "") is late


async def test_an_error_that_comes_later() -> None:
    answer = await settled(_fails(Overloaded("full")), "id-1")
    assert answer is not None
    assert answer.code == "overloaded"
    assert json.loads(answer.body)["request_id"] == "id-1"


async def test_a_fault_is_logged_and_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert await settled(_fails(ZeroDivisionError("mine")), "") is None
    (record,) = caplog.records
    assert record.getMessage() == "answer_fault"
    assert "mine" in record.fields["error"]


async def test_a_cancellation_goes_on() -> None:
    with pytest.raises(asyncio.CancelledError):
        await settled(_fails(asyncio.CancelledError()), "")


HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"x-request-id: abc-1", b"abc-1"),
        (b"X-Request-ID:abc", b"abc"),
        (b"X-REQUEST-ID: \t abc \t ", b"abc"),
        (b"x-request-id: first\r\nx-request-id: second", b"first"),
        (b"x-request-id: " + b"a" * 200, b"a" * 200),
        (b"x-request-id: " + b"a" * 201, b""),
        (b"x-request-id: two words", b""),
        (b"x-request-id: \xe2\x82\xac", b""),
        (b"x-request-id: a\x00b", b""),
        (b"x-request-id:", b""),
        (b"x-request-id : abc", b""),
        (b" x-request-id: abc", b""),
        (b"a: x-request-id: abc", b""),
        (b"xx-request-id: abc", b""),
        (b"a: b", b""),
    ],
)
def test_a_request_id_in_a_head_that_is_not_parsed(line: bytes, found: bytes) -> None:
    assert find_request_id(HEAD % line) == found


def test_a_request_id_is_found_behind_what_cannot_be_parsed() -> None:
    assert find_request_id(b"\x00\xff\r\nbad line\r\nx-request-id: abc\r\n\r\n") == b"abc"
    assert find_request_id(b"x-request-id: abc") == b"", "its end has not come"


def test_looking_for_a_request_id_takes_no_time() -> None:
    # Many near misses: a pattern that backtracks would take minutes over these 64 KiB.
    block = b"x-request-id:" + b" \t" * 32_000 + b"\r\n"
    assert find_request_id(block) == b""
    assert find_request_id(b"x-request-id: a\n" * 4_000) == b""
