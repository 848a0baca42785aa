"""What TLS does where the event loop's transport is in a certain state: closed, full, reset."""

from __future__ import annotations

import ssl

import pytest
from tests.identity.conftest import Kms
from tests.identity.conftest import kms as kms
from tests.relay.tls_memory import Both
from tests.relay.tls_scene import TLS12, TLS13


@pytest.mark.parametrize("version", [TLS12, TLS13])
def test_where_the_peer_has_reset_it_closing_is_no_error(kms: Kms, version: ssl.TLSVersion) -> None:
    """asyncio's own loop raises where its side of such a connection is ended."""
    both = Both(kms, version, server_side=True)
    both.raw.broken = True
    both.ours.close()
    assert both.raw.aborted


def test_closing_what_the_event_loop_is_closing_already_changes_nothing(kms: Kms) -> None:
    both = Both(kms, TLS13, server_side=True)
    both.raw.closed = True
    both.ours.close()
    assert both.raw.sent == b""
    assert not both.raw.ended
    assert not both.raw.aborted


def test_a_bare_end_is_an_end_though_something_is_still_to_be_sent(kms: Kms) -> None:
    """Nobody may take the connection for one that is open until then."""
    both = Both(kms, TLS13, server_side=False)
    both.raw.unread = 100
    assert not both.ours.eof_received()
    assert both.ours.is_closing()
    both.ours.write(b"too late")
    assert both.raw.sent == b""
    both.ours.connection_lost(None)
    assert both.protocol.events == ["made", "lost"]


def test_what_the_event_loop_has_closed_is_written_to_without_an_error(kms: Kms) -> None:
    both = Both(kms, TLS13, server_side=True)
    both.raw.closed = True
    both.ours.write(b"x")
    assert both.raw.sent == b""


def test_a_failed_connection_does_not_wait_for_a_slow_reader(kms: Kms) -> None:
    both = Both(kms, TLS13, server_side=True)
    broken = bytearray(both.seal(b"hello"))
    broken[-1] ^= 1
    both.raw.unread = 100_000
    both.say(bytes(broken))
    assert both.raw.closed
    assert not both.raw.aborted, "the alert comes after what was written before"
    assert both.ours.deadline <= both.worker.clock() + both.worker.timeouts.linger
    both.ours.expire(both.worker.clock())
    assert both.raw.aborted


def test_a_slow_reader_is_looked_at_again_and_again(kms: Kms) -> None:
    both = Both(kms, TLS13, server_side=True)
    both.raw.unread = 100_000
    both.ours.close()
    for now in (100.0, 200.0):
        both.ours.expire(now)
        assert both.ours.deadline == now + both.worker.timeouts.linger
    assert not both.raw.aborted
    both.raw.unread = 0
    both.ours.expire(300.0)
    assert both.raw.aborted


@pytest.mark.parametrize("close", [False, True], ids=["open", "closing"])
def test_what_the_event_loop_wishes_is_passed_on(kms: Kms, close: bool) -> None:
    both = Both(kms, TLS13, server_side=True)
    if close:
        both.ours.close()
    both.ours.pause_writing()
    assert both.protocol.paused
    both.ours.resume_writing()
    assert not both.protocol.paused
    both.ours.connection_lost(None)
    both.ours.pause_writing()
    assert not both.protocol.paused
    both.ours.resume_writing()
