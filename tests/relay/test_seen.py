"""What comes of it on a connection is in test_downstream.py, "What comes again"."""

from __future__ import annotations

from tests.relay.fakes import FakePlan

from dstack_mesh.relay.seen import Seen
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import parse_request_line


def test_it_holds_the_head_and_what_was_made_of_it() -> None:
    block = b"Host: a\r\n"
    line = parse_request_line(b"GET / HTTP/1.1")
    plan = FakePlan(parse_request_fields(block, 1, frozenset()))
    seen = Seen(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", line, block, plan, None)
    assert (seen.line, seen.block, seen.plan, seen.route) == (line, block, plan, None)
