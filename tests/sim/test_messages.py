"""Requests as handlers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dstack_mesh.sim.messages import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def body() -> AsyncIterator[bytes]:
    yield b"a"
    yield b"b"


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/a/b?c=d?e", "/a/b", "c=d?e"),
        ("/a/../b%2f", "/a/../b%2f", ""),
        ("http://host/a?b", "/a", "b"),
        ("*", "*", ""),
        ("/a?u=http://b/c", "/a", "u=http://b/c"),
    ],
)
async def test_target_in_parts(target: str, path: str, query: str) -> None:
    request = Request("GET", target, [], "1.1", body(), [])
    assert (request.path, request.query) == (path, query)
    assert await request.read() == b"ab"


async def test_header_is_the_first_of_its_name_in_any_case() -> None:
    request = Request("GET", "/", [("X-A", "1"), ("x-a", "2")], "1.1", body(), [])
    assert request.header("x-A") == "1"
    assert request.header("x-b") is None
