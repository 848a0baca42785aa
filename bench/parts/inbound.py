"""Embedded inbound: mutual TLS in, plain HTTP out; nginx with and without `auth_request`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from bench.contestants import Contestant, auth_request_inbound, inbound, nginx_inbound
from bench.mtls import Clients, clients
from bench.origin import Origin, origin
from bench.parts.outbound import below, quantiles
from bench.plan import Found, Plan
from bench.race import Readings, Row, Subject, race
from bench.turns import Meter, asking, by_mtls

_SCENARIOS: dict[int, tuple[tuple[str, float, dict[str, Any]], ...]] = {
    32: (
        ("small GET, 32 connections", 2.0, {}),
        ("GET, 20 headers that vary, 32 connections", 1.5, {"varied": True}),
        ("response of 16 KB, 32 connections", 0.8, {"path": "/16k"}),
    ),
    1: (("small GET, 1 connection", 0.8, {}),),
    256: (("small GET, 256 connections", 0.8, {}),),
}
"""By the number of connections: name, seconds, and what is asked."""


@contextlib.contextmanager
def _all(made: Origin) -> Iterator[list[Contestant]]:
    with (
        inbound(made) as mesh,
        nginx_inbound(made) as peer,
        auth_request_inbound(made) as auth_request,
    ):
        yield [mesh, peer, auth_request]


def small_requests(plan: Plan) -> Found:
    """What goes through, in five scenarios."""
    rows: list[Row] = []
    with origin() as made, _all(made) as contestants:
        for connections, scenarios in _SCENARIOS.items():
            if plan.short and connections > 100:
                continue  # opening them takes longer than all the rest
            # nginx opens a connection to the auth service for each request that is in flight; with
            # 256 at once it needs a longer queue than a unix socket of asyncio's has by default.
            some = contestants[:2] if connections > 100 else contestants
            with by_mtls(some, made.caller, connections) as connected:
                for scenario, seconds, what in scenarios:
                    subjects = [
                        Subject(one.name, asking(one, over, plan.seconds(seconds), **what))
                        for one, over in connected
                    ]
                    rows += race(scenario, subjects, plan.rounds)
    return Found("Inbound", rows)


def latency(plan: Plan) -> Found:
    """At a fixed rate, by the harness's own client: h2load can't show a certificate."""
    seconds = plan.seconds(2.0)
    with (
        origin() as made,
        _all(made) as contestants,
        by_mtls(contestants, made.caller, 50) as connected,
    ):
        most = [asking(one, over, plan.seconds(0.5))()["rate"] for one, over in connected]
        rate = below(most, 500 if plan.short else plan.rate // 2)

        def subject(one: Contestant, over: Clients) -> Subject:
            def turn() -> Readings:
                done = over.do("rate", rate=rate, seconds=seconds)
                return quantiles(sorted(done["times"]))

            return Subject(one.name, turn)

        subjects = [subject(one, over) for one, over in connected]
        rows = race(f"small GET, {rate:,} a second, 50 connections", subjects, plan.rounds)
    return Found("Inbound, latency at a fixed rate", rows)


def new_connections(plan: Plan) -> Found:
    """Each connection carries one small GET, which is counted with it."""
    rows: list[Row] = []
    with (
        origin() as made,
        inbound(made) as mesh,
        nginx_inbound(made) as peer,
        nginx_inbound(made, tickets=False) as without,
    ):
        rows += _new("full handshake", [mesh, peer, without], made, plan, resume=False)
        rows += _new("session offered", [mesh, peer], made, plan, resume=True)
    return Found("Inbound, new connections", rows)


def _new(
    scenario: str, contestants: Sequence[Contestant], made: Origin, plan: Plan, *, resume: bool
) -> list[Row]:
    with contextlib.ExitStack() as stack:

        def subject(one: Contestant) -> Subject:
            over = stack.enter_context(clients(one.address, 0, made.caller))

            def turn() -> Readings:
                with Meter(one.process) as meter:
                    done = over.do("connect", seconds=plan.seconds(0.8), resume=resume)
                count = done["connections"]
                readings = {"cpu_us_connection": meter.cpu / count * 1e6}
                return readings | ({"resumed": done["resumed"] / count} if resume else {})

            return Subject(one.name, turn)

        return race(scenario, [subject(one) for one in contestants], plan.rounds)
