"""The agent's encodings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dstack_mesh.sim.answers import json_answer, page, protobuf_answer, wants_protobuf
from dstack_mesh.sim.messages import HeaderPairs, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def body() -> AsyncIterator[bytes]:
    yield b""


@pytest.mark.parametrize(
    ("method", "target", "headers", "expected"),
    [
        ("GET", "/Info", [], False),
        ("GET", "/Version?json=false", [], False),
        ("POST", "/Info", [], True),
        ("POST", "/Info?json", [], False),
        ("POST", "/Info?a=1&json=x", [], False),
        ("POST", "/Info", [("Content-Type", "application/json; charset=utf-8")], False),
        ("POST", "/Info", [("content-type", "application/octet-stream")], True),
    ],
)
def test_protobuf_is_a_post_that_nothing_marks_as_json(
    method: str, target: str, headers: HeaderPairs, expected: bool
) -> None:
    request = Request(method, target, headers, "1.1", body(), [])
    assert wants_protobuf(request) is expected


def test_json_shows_bytes_as_hex() -> None:
    answer = json_answer(200, {"key": b"\x01\xff", "chain": [b"\x02"], "text": "a", "valid": True})
    assert answer.body == b'{"key":"01ff","chain":["02"],"text":"a","valid":true}'
    assert ("content-type", "application/json") in answer.headers


def test_protobuf_numbers_fields_and_leaves_out_defaults() -> None:
    answer = protobuf_answer(200, {"version": "0.6.0", "empty": "", "no": False, "yes": True})
    assert answer.body == b"\x0a\x050.6.0\x20\x01"
    long = protobuf_answer(200, {"chain": ["a" * 300, "b"]})
    assert long.body == b"\x0a\xac\x02" + b"a" * 300 + b"\x0a\x01b"


def test_protobuf_error_is_the_recorded_one() -> None:
    text = "failed to decode Protobuf message: buffer underflow"
    assert protobuf_answer(400, {"error": text}).body == b"\n3" + text.encode()


def test_page_is_html() -> None:
    answer = page(404, "Not Found")
    assert answer.status == 404
    assert ("content-type", "text/html; charset=utf-8") in answer.headers
