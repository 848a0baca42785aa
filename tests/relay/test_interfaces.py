"""Base classes that fakes and the real parts share: what is not said is an error, not silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.relay.fakes import FakeHandler, FakeTransport, rig

from dstack_mesh.relay.deadlines import NEVER, Timeouts
from dstack_mesh.relay.downstream import Downstream
from dstack_mesh.relay.exchange import Exchange
from dstack_mesh.relay.interfaces import Client, Handler, Listener, Plan
from dstack_mesh.relay.service import Service
from dstack_mesh.relay.upstream import Connector, ResponseSink, Upstream, Waiter
from dstack_mesh.relay.worker import Worker
from dstack_mesh.wire.request import parse_request_fields
from dstack_mesh.wire.request_line import RequestLine

BASES = [Client, Connector, Handler, Listener, Plan, ResponseSink, Waiter]
NOTHING: Any = None
LINE = RequestLine(b"GET", b"/", 1)


@pytest.fixture
async def worker() -> Any:
    one = Worker(asyncio.get_running_loop(), Timeouts())
    yield one
    one.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda worker: Handler().plan(LINE, b""),
        lambda worker: Handler().route(LINE, NOTHING),
        lambda worker: Client(worker).write(b""),
        lambda worker: Client(worker).pause_reading(),
        lambda worker: Client(worker).resume_reading(),
        lambda worker: Client(worker).keep_for_later(b""),
        lambda worker: Client(worker).begin_tunnel(),
        lambda worker: Client(worker).may_persist(),
        lambda worker: Client(worker).exchange_ended(NOTHING, keep=True),
        lambda worker: Client(worker).drain(),
        lambda worker: Client(worker).cut(),
        lambda worker: Listener(worker).opened(NOTHING),
        lambda worker: Listener(worker).closed(NOTHING),
        lambda worker: Listener(worker).record(NOTHING),
        lambda worker: Waiter().connected(NOTHING),
        lambda worker: Waiter().not_connected(NOTHING),
        lambda worker: ResponseSink().response_data(b""),
        lambda worker: ResponseSink().upstream_lost(NOTHING, None),
        lambda worker: ResponseSink().upstream_writable(True),
        lambda worker: Connector().lost(None),
        lambda worker: Connector().generation(),
    ],
)
async def test_what_is_left_out_is_an_error(worker: Worker, call: Callable[[Worker], Any]) -> None:
    with pytest.raises(NotImplementedError):
        call(worker)


async def test_a_connector_has_to_connect() -> None:
    with pytest.raises(NotImplementedError):
        await Connector().connect(NOTHING)


async def test_what_may_be_left_out() -> None:
    handler = Handler[Plan]()
    handler.connected(FakeTransport(NOTHING))
    assert handler.may_persist()


async def test_what_they_begin_with(worker: Worker) -> None:
    client, listener, waiter = Client(worker), Listener(worker), Waiter()
    assert (client.worker, client.deadline, client.writable) == (worker, NEVER, True)
    assert (listener.worker, listener.draining) == (worker, False)
    assert (waiter.fresh_only, waiter.ended) == (False, False)
    fields = parse_request_fields(b"Host: a\r\n", 1, frozenset())
    assert Plan(fields).fields is fields


@pytest.mark.parametrize("base", BASES)
def test_they_keep_nothing_but_what_they_name(base: type) -> None:
    """Else each of their objects would have a dictionary: memory, and slow where compiled."""
    assert "__slots__" in vars(base)
    assert "__dict__" not in vars(base)


@pytest.mark.parametrize("made", [Downstream, Exchange, Upstream])
def test_what_there_is_of_by_the_thousand_has_no_dictionary(made: type) -> None:
    assert made.__dictoffset__ == 0


async def test_the_real_parts_are_of_them() -> None:
    async with rig() as one:
        assert isinstance(one.downstream, Client)
        assert isinstance(one.service, Listener)
        assert isinstance(FakeHandler(one.lane), Handler)
        assert issubclass(Exchange, ResponseSink)
        assert issubclass(Service, Listener)
