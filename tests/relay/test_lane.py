"""Who gets which connection, and how many are opened."""

from __future__ import annotations

import logging
import time

import pytest
from tests.relay.fakes import (
    GET_1,
    OK,
    REMOVE,
    RULES,
    FakeConnector,
    FakeTransport,
    Opened,
    Rig,
    open_one,
    rig,
)

from dstack_mesh.errors import ConnectFailed, MeshError
from dstack_mesh.relay import lane as lanes
from dstack_mesh.relay.deadlines import NEVER, Timeouts
from dstack_mesh.relay.lane import Lane, Route
from dstack_mesh.relay.upstream import Upstream, Waiter


class Asks(Waiter):
    """Waits in line, and remembers what it got."""

    def __init__(self, one: Rig, *, fresh_only: bool = False, lane: Lane | None = None) -> None:
        super().__init__()
        self.fresh_only = fresh_only
        self.lane = lane or one.lane
        self.got: Upstream | None = None
        self.error: MeshError | None = None
        self.gives_back = False
        """Whether it has done with its connection as soon as it gets it."""
        self.asks_again = 0
        """How often it waits anew when it is told that there is none."""
        self.ends: Asks | None = None
        """Another one whose end comes with the error of this one."""
        if not fresh_only:  # as a request that is sent for the first time
            assert self.lane.take(one.worker.clock()) is None
        self.lane.wait(self)

    def connected(self, upstream: Upstream) -> None:
        assert not self.ended
        assert self.got is None
        self.got = upstream
        if self.gives_back:
            self.lane.release(upstream, self.lane.worker.clock())

    def not_connected(self, error: MeshError) -> None:
        assert not self.ended
        self.error = error
        if self.ends is not None:
            self.ends.ended = True
        if self.asks_again:
            self.asks_again -= 1
            self.lane.wait(self)


def ask(one: Rig, count: int) -> list[Asks]:
    return [Asks(one) for _ in range(count)]


def give_back(one: Rig, opened: Opened) -> None:
    one.lane.release(opened.upstream, one.worker.clock())


async def fail(one: Rig, text: str = "refused") -> None:
    await one.connect(ConnectFailed(text))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have limits that are reached soon."""
    monkeypatch.setattr(lanes, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(lanes, "MAX_ATTEMPTS", 2)


# Idle connections.


async def test_an_empty_lane_gives_nothing() -> None:
    async with rig() as one:
        assert one.lane.take(one.worker.clock()) is None


async def test_the_connection_used_last_is_given_first() -> None:
    async with rig() as one:
        first, second = open_one(one, idle=True), open_one(one, idle=True)
        taken = one.lane.take(one.worker.clock())
        assert taken is second.upstream
        assert (taken.reused, taken.deadline) == (True, NEVER)
        assert one.lane.take(one.worker.clock()) is first.upstream
        assert one.lane.take(one.worker.clock()) is None


async def test_a_connection_of_an_older_identity_is_not_used_again() -> None:
    async with rig() as one:
        old = open_one(one, idle=True)
        one.connector.number = 2
        new = open_one(one, generation=2, idle=True)
        busy = open_one(one)
        one.lane.release(busy.upstream, one.worker.clock())
        assert busy.transport.is_closing()
        one.lane.idle.reverse()
        assert one.lane.take(one.worker.clock()) is new.upstream
        assert old.transport.is_closing()
        assert not old.transport.aborted


@pytest.mark.parametrize("why", ["age", "the peer's certificate", "on its way out"])
async def test_a_connection_is_not_used_longer_than_it_may(why: str) -> None:
    async with rig() as one:
        idle = open_one(one, not_after=time.time() + 1000, idle=True)
        if why == "age":
            idle.upstream.expires_at = one.worker.clock()
        elif why == "the peer's certificate":
            idle.upstream.not_after = time.time()
        else:
            idle.transport.close()
        assert one.lane.take(one.worker.clock()) is None
        assert idle.transport.is_closing()
        one.lane.release(idle.upstream, one.worker.clock())
        assert one.lane.idle == []


async def test_a_dead_connection_leaves_the_pool() -> None:
    async with rig() as one:
        kept, dead = open_one(one, idle=True), open_one(one, idle=True)
        dead.transport.receive_eof()
        await one.turn()
        assert one.lane.idle == [kept.upstream]
        assert one.worker.upstreams == {kept.upstream}


async def test_an_idle_connection_is_not_kept_beyond_its_age() -> None:
    async with rig() as one:
        opened = open_one(one)
        opened.upstream.expires_at = one.worker.clock() + 1
        one.lane.release(opened.upstream, one.worker.clock())
        assert opened.upstream.deadline == opened.upstream.expires_at


async def test_draining_closes_what_may_not_be_used_any_more() -> None:
    async with rig() as one:
        old = open_one(one, idle=True)
        one.connector.number = 2
        new = open_one(one, generation=2, idle=True)
        one.lane.drain()
        assert one.lane.idle == [new.upstream]
        assert (old.transport.is_closing(), old.transport.aborted) == (True, False)
        assert not new.transport.is_closing()


async def test_a_route_holds_what_it_was_given() -> None:
    async with rig() as one:
        route = Route(one.lane, b"head", RULES, REMOVE)
        assert (route.lane, route.head, route.rules) == (one.lane, b"head", RULES)
        assert route.remove_trailers is REMOVE


async def test_an_idle_connection_that_was_closed_is_passed_over() -> None:
    async with rig() as one:
        good, bad = open_one(one, idle=True), open_one(one, idle=True)
        bad.transport.close()
        assert one.lane.take(one.worker.clock()) is good.upstream


# Waiting in line.


async def test_a_connection_is_opened_for_each_that_waits() -> None:
    async with rig() as one:
        assert not one.lane.in_use
        first, second = ask(one, 2)
        await one.turn()
        assert len(one.connector.asked) == 2
        assert one.lane.in_use
        await one.connect()
        assert first.got is not None
        assert (first.got.reused, second.got) == (False, None)
        await one.connect()
        assert second.got is not None
        assert second.got is not first.got
        assert (one.lane.open, one.lane.idle) == (2, [])


async def test_first_come_first_served_also_by_what_others_give_back() -> None:
    async with rig() as one:
        busy = open_one(one)
        first, second, third = ask(one, 3)
        give_back(one, busy)
        assert first.got is busy.upstream
        assert first.got.reused
        await one.connect()
        assert second.got is not None
        assert (second.got.reused, third.got) == (False, None)
        give_back(one, busy)
        assert third.got is busy.upstream
        # What was asked for meanwhile is kept.
        await one.connect()
        await one.connect()
        assert len(one.lane.idle) == 2


async def test_no_more_is_opened_than_there_are_that_wait() -> None:
    async with rig() as one:
        busy = open_one(one)
        ask(one, 1)
        give_back(one, busy)
        ask(one, 1)
        await one.turn()
        assert len(one.connector.asked) == 1, "the one under way is for the second"


async def test_whoever_went_away_is_passed_over() -> None:
    async with rig() as one:
        busy = open_one(one)
        gone, stays, also_gone = ask(one, 3)
        gone.ended = also_gone.ended = True
        give_back(one, busy)
        assert (gone.got, stays.got) == (None, busy.upstream)
        give_back(one, busy)
        assert one.lane.idle == [busy.upstream]


async def test_errors_too_pass_over_whoever_went_away() -> None:
    async with rig() as one:
        gone, stays = ask(one, 2)
        gone.ended = True
        await fail(one)
        assert (gone.error, stays.error is not None) == (None, True)


async def test_those_that_gave_up_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_CONNECTIONS", 1)
    async with rig() as one:
        open_one(one)  # and it is never given back
        for _ in range(1000):
            asks = Asks(one)
            asks.ended = True
        assert len(one.lane._waiting) == 1


async def test_a_request_sent_again_gets_no_used_connection() -> None:
    async with rig() as one:
        busy = open_one(one)
        again, other = Asks(one, fresh_only=True), Asks(one)
        give_back(one, busy)
        assert (again.got, other.got) == (None, busy.upstream)
        give_back(one, busy)
        assert (again.got, one.lane.idle) == (None, [busy.upstream])
        await one.connect()
        assert again.got is not None
        assert (again.got.reused, again.got is busy.upstream) == (False, False)


async def test_requests_sent_again_keep_their_places() -> None:
    async with rig() as one:
        busy = open_one(one)
        kinds = (True, True, False, False)
        first, second, third, last = (Asks(one, fresh_only=fresh) for fresh in kinds)
        give_back(one, busy)
        assert third.got is busy.upstream
        await one.connect()
        assert (first.got is not None, second.got, last.got) == (True, None, None)
        await one.connect()
        assert (second.got is not None, last.got) == (True, None)


async def test_a_waiter_may_be_done_at_once() -> None:
    """Each gives its connection back from within: the next one has it, and no stack grows."""
    async with rig() as one:
        busy = open_one(one)
        asks = ask(one, 100)
        for each in asks:
            each.gives_back = True
        give_back(one, busy)
        assert [each.got for each in asks] == [busy.upstream] * 100
        assert one.lane.idle == [busy.upstream]


async def test_a_waiter_may_wait_again_at_once() -> None:
    async with rig() as one:
        (asks,) = ask(one, 1)
        asks.asks_again = 9
        for attempt in range(1, 6):
            await fail(one, f"attempt {attempt}")
            assert asks.error is not None
            assert asks.error.detail == f"attempt {attempt}", "each time by an attempt of its own"
            assert asks.asks_again == 9 - attempt
        await one.connect()
        assert asks.got is not None


# Limits.


async def test_attempts_at_once_are_limited(small: None) -> None:
    async with rig() as one:
        asks = ask(one, 3)
        await one.turn()
        assert len(one.connector.asked) == 2
        await one.connect()
        assert len(one.connector.asked) == 2
        await one.connect()
        await one.connect()
        assert all(each.got for each in asks)
        assert one.connector.asked == []


async def test_connections_are_limited(small: None) -> None:
    async with rig() as one:
        busy = [open_one(one) for _ in range(3)]
        asks = ask(one, 3)
        await one.turn()
        assert len(one.connector.asked) == 1, "it and the three are four"
        await one.connect()
        await one.turn()
        assert (asks[0].got is not None, one.connector.asked) == (True, [])
        busy[0].transport.abort()
        await one.connect()
        assert asks[1].got is not None, "there is room again"
        give_back(one, busy[1])
        assert asks[2].got is busy[1].upstream
        assert one.lane.open == 4


async def test_at_the_limit_an_idle_connection_makes_room_for_a_new_one(small: None) -> None:
    async with rig() as one:
        for _ in range(2):
            open_one(one)
        longest, latest = open_one(one, idle=True), open_one(one, idle=True)
        again = Asks(one, fresh_only=True)
        assert one.lane.idle == [latest.upstream]
        await one.connect()
        assert again.got is not None
        assert (longest.transport.lost, latest.transport.is_closing()) == (True, False)
        assert one.lane.open == 4


async def test_at_the_limit_what_is_given_back_makes_room_for_a_new_one(small: None) -> None:
    async with rig() as one:
        busy = [open_one(one) for _ in range(4)]
        again = Asks(one, fresh_only=True)
        await one.turn()
        assert one.connector.asked == []
        give_back(one, busy[0])
        assert (busy[0].transport.is_closing(), one.lane.idle) == (True, [])
        await one.connect()
        assert again.got is not None
        assert one.lane.open == 4


# Failures.


async def test_a_failed_attempt_is_told_to_whoever_has_waited_longest() -> None:
    async with rig() as one:
        first, second, third = ask(one, 3)
        await fail(one, "no route")
        assert first.error is not None
        assert first.error.detail == "no route"
        assert (second.error, third.error) == (None, None)
        await one.connect()
        assert (second.got is not None, third.got) == (True, None)


async def test_what_fails_again_and_again_is_told_to_all_and_tried_once_at_a_time() -> None:
    async with rig() as one:
        asks = ask(one, 6)
        for _ in range(3):
            await fail(one)
        assert all(each.error for each in asks)
        for _, wanted in one.connector.asked:
            wanted.cancel()  # as an attempt that is cancelled from outside: nobody learns of it
        one.connector.asked.clear()
        await one.turn()
        later = ask(one, 5)
        await one.turn()
        assert len(one.connector.asked) == 1
        await fail(one, "still")
        assert [each.error.detail for each in later if each.error] == ["still"] * 5
        await one.turn()
        assert one.connector.asked == []


async def test_who_ends_while_others_are_told_is_told_nothing() -> None:
    async with rig() as one:
        for _ in range(2):
            ask(one, 1)
            await fail(one)
        asks = ask(one, 3)
        asks[0].ends = asks[1]
        await fail(one)
        assert [each.error is not None for each in asks] == [True, False, True]


async def test_one_success_ends_the_caution() -> None:
    async with rig() as one:
        for _ in range(3):
            ask(one, 1)
            await fail(one)
        asks = ask(one, 3)
        await one.turn()
        assert len(one.connector.asked) == 1
        await one.connect()
        assert asks[0].got is not None
        await one.turn()
        assert len(one.connector.asked) == 2
        await fail(one)
        assert (asks[1].error is not None, asks[2].error) == (True, None)


async def test_a_failure_of_our_own_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    async with rig() as one:
        (asks,) = ask(one, 1)
        with caplog.at_level(logging.ERROR):
            await one.connect(RuntimeError("a fault"))
        assert isinstance(asks.error, ConnectFailed)
        assert "see the log" in asks.error.detail
        assert "a fault" not in asks.error.detail
        assert "connect_fault" in caplog.text


class DeadOnArrival(FakeConnector):
    """Its connections are gone when it hands them over."""

    async def connect(self, lane: Lane) -> Upstream:
        upstream = Upstream(lane)
        transport = FakeTransport(upstream)
        upstream.connection_made(transport)
        transport.break_off(ConnectionResetError("reset"))
        upstream.admit(None, self.number)
        self.opened.append(transport)
        return upstream


async def test_a_connection_that_is_gone_is_never_handed_over() -> None:
    async with rig() as one:
        one.lane.connector = one.connector = DeadOnArrival()
        (asks,) = ask(one, 1)
        await one.turn()
        assert asks.got is None
        assert asks.error is not None
        assert asks.error.detail == "lost: reset"
        assert (one.lane.open, one.lane.in_use, one.lane.idle) == (0, False, [])


class EndsAtOnce(FakeConnector):
    """The peer ends its connections as soon as they are there."""

    async def connect(self, lane: Lane) -> Upstream:
        upstream = Upstream(lane)
        transport = FakeTransport(upstream)
        upstream.connection_made(transport)
        upstream.admit(None, self.number)
        self.opened.append(transport)
        transport.receive_eof()
        return upstream


async def test_a_connection_that_ends_as_it_is_handed_over_is_its_requests_failure() -> None:
    async with rig() as one:
        one.lane.connector = one.connector = EndsAtOnce()
        one.client.receive(GET_1)
        await one.turn()
        assert b" 502 " in (answer := one.client.take())
        assert b"lost: None" in answer
        assert len(one.connector.opened) == 1, "nothing is tried twice on a connection never used"


async def test_a_peer_that_ends_every_connection_is_not_called_in_a_loop() -> None:
    async with rig() as one:
        busy = open_one(one)
        one.lane.take(one.worker.clock())
        one.lane.connector = one.connector = EndsAtOnce()
        one.connector.number = 2
        give_back(one, busy)
        await one.turn()
        await one.turn()
        assert len(one.connector.opened) == 1
        assert not one.lane.in_use


# One connection is kept ready.


async def test_after_a_renewal_one_connection_is_opened_anew() -> None:
    async with rig() as one:
        idle = [open_one(one, idle=True) for _ in range(3)]
        one.lane.take(one.worker.clock())
        one.lane.idle.append(idle[2].upstream)
        one.connector.number = 2
        one.lane.drain()
        assert all(each.transport.is_closing() for each in idle)
        await one.connect()
        assert one.connector.asked == []
        assert [each.transport for each in one.lane.idle] == [one.upstream]
        taken = one.lane.take(one.worker.clock())
        assert taken is not None
        assert taken.generation == 2


async def test_while_one_is_opened_no_other_is() -> None:
    async with rig() as one:
        busy, idle = open_one(one), open_one(one)
        ask(one, 1)
        await one.turn()
        give_back(one, busy)
        give_back(one, idle)
        assert one.lane.idle == [idle.upstream]
        one.connector.number = 2
        one.lane.drain()
        await one.turn()
        assert idle.transport.is_closing()
        assert len(one.connector.asked) == 1


async def test_what_was_opened_under_the_identity_before_is_given_to_nobody_later() -> None:
    async with rig() as one:
        busy = open_one(one)
        (asks,) = ask(one, 1)
        await one.turn()
        give_back(one, busy)
        assert asks.got is busy.upstream, "which leaves the attempt to nobody"
        one.connector.number = 2
        one.lane.drain()
        old = await one.connect()
        assert old.is_closing()
        new = await one.connect()
        assert [each.transport for each in one.lane.idle] == [new]


async def test_a_connection_too_old_for_another_request_is_replaced() -> None:
    async with rig() as one:
        busy = open_one(one)
        one.lane.take(one.worker.clock())
        busy.upstream.expires_at = one.worker.clock()
        give_back(one, busy)
        assert busy.transport.is_closing()
        await one.connect()
        assert len(one.lane.idle) == 1


async def test_a_connection_that_grew_too_old_while_idle_is_replaced() -> None:
    async with rig() as one:
        busy = open_one(one)
        one.lane.take(one.worker.clock())
        busy.upstream.expires_at = one.worker.clock()
        one.lane.idle.append(busy.upstream)
        busy.upstream.expire(one.worker.clock())
        await one.connect()
        assert [each.transport for each in one.lane.idle] == [one.upstream]


async def test_a_connection_that_was_idle_for_long_or_that_the_peer_ends_is_not() -> None:
    async with rig() as one:
        for end in (lambda it: it.upstream.expire(0), lambda it: it.transport.receive_eof()):
            idle = open_one(one, idle=True)
            one.lane._last_taken = one.worker.clock()
            end(idle)
            await one.turn()
            assert idle.transport.lost
        assert (one.connector.asked, one.lane.in_use) == ([], False)


@pytest.mark.parametrize("why", ["no request lately", "never a request", "failures", "others idle"])
async def test_no_connection_is_kept_ready_without_need(why: str) -> None:
    async with rig() as one:
        idle = open_one(one, idle=True)
        now = one.worker.clock()
        if why != "never a request":
            one.lane._last_taken = now - (60 if why == "no request lately" else 0)
        if why == "failures":
            one.lane._failures = 1
        one.connector.number = 2
        if why == "others idle":
            open_one(one, generation=2, idle=True)
        one.lane.drain()
        await one.turn()
        assert idle.transport.is_closing()
        assert one.connector.asked == []


async def test_no_connection_is_kept_ready_beyond_the_limit(small: None) -> None:
    async with rig() as one:
        busy = [open_one(one) for _ in range(4)]
        one.lane.take(one.worker.clock())
        one.connector.number = 2
        give_back(one, busy[0])
        assert busy[0].transport.is_closing()
        await one.turn()
        assert one.connector.asked == []


async def test_a_failure_to_keep_one_ready_is_told_to_nobody_and_not_repeated() -> None:
    async with rig() as one:
        open_one(one, idle=True)
        one.lane._last_taken = one.worker.clock()
        one.connector.number = 2
        one.lane.drain()
        await fail(one)
        await one.turn()
        assert (one.connector.asked, one.lane.in_use) == ([], False)


async def test_draining_leaves_attempts_and_those_that_wait_for_them() -> None:
    async with rig() as one:
        asks = ask(one, 2)
        one.lane.drain()
        await one.connect()
        await one.connect()
        assert all(each.got for each in asks)


# The end.


async def test_closing_gives_up_attempts_and_begins_no_more() -> None:
    async with rig() as one:
        busy = open_one(one)
        asks = ask(one, 2)
        await one.turn()
        one.lane.close()
        await one.turn()
        assert [wanted.cancelled() for _, wanted in one.connector.asked] == [True, True]
        one.connector.asked.clear()
        assert not one.lane._tasks
        busy.transport.abort()
        ask(one, 1)
        await one.turn()
        assert (one.connector.asked, one.lane.in_use) == ([], False)
        assert [each.got for each in asks] == [None, None]


# With real exchanges.


async def test_a_request_gives_up_waiting() -> None:
    timeouts = Timeouts(connect=0.05)
    async with rig(timeouts) as one:
        one.client.receive(GET_1)
        await one.turn()
        assert one.downstream.deadline == pytest.approx(one.worker.clock() + timeouts.wait, abs=1)
        one.downstream.expire(one.downstream.deadline)
        answer = one.client.take()
        assert b" 504 " in answer
        assert b"no connection became free within 0.05 s (MESH_CONNECT_TIMEOUT)" in answer
        await one.connect()
        assert one.upstream.take() == b"", "and nothing is sent for it any more"
        assert len(one.lane.idle) == 1


async def test_a_client_that_left_gets_no_connection() -> None:
    async with rig() as one:
        one.client.receive(GET_1)
        await one.turn()
        one.client.break_off()
        other = one.accept()
        other.receive(GET_1)
        await one.turn()
        await one.connect()
        assert one.upstream.take().startswith(b"GET /1 ")
        one.upstream.receive(OK)
        await one.turn()
        assert other.take().endswith(b"ok")


async def test_two_clients_share_a_connection_by_turns() -> None:
    async with rig() as one:
        other = one.accept()
        one.client.receive(GET_1)
        other.receive(GET_1)
        first = await one.connect()
        assert first.take().count(b"GET /1 ") == 1
        first.receive(OK)
        await one.turn()
        assert first.take().count(b"GET /1 ") == 1, "the other's, as soon as it was free"
        assert one.client.take().endswith(b"ok")
        first.receive(OK)
        await one.turn()
        assert other.take().endswith(b"ok")


async def test_many_destinations_have_lanes_of_their_own() -> None:
    async with rig() as one:
        connectors = [FakeConnector() for _ in range(20)]
        others = [Lane(one.worker, connector) for connector in connectors]
        for lane in others:
            Asks(one, lane=lane)
        await one.turn()
        assert [len(connector.asked) for connector in connectors] == [1] * 20
        for lane in others:
            lane.close()
        await one.turn()
        assert not any(lane.in_use for lane in others)
