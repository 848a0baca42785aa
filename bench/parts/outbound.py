"""Outbound: plain HTTP in, mutual TLS out, against nginx and HAProxy as client proxies."""

from __future__ import annotations

from dataclasses import dataclass

from bench.contestants import Contestant, all_outbound, many_targets
from bench.h2load import PER_CLIENT, SHARE, quantile
from bench.h2load import run as h2load
from bench.origin import DOMAIN, Origin, origin
from bench.plan import Found, Plan
from bench.race import Readings, Row, Subject, race
from bench.turns import by_wrk

TARGETS = 50


@dataclass(frozen=True)
class Scenario:
    """What wrk asks."""

    name: str
    path: str = "/"
    connections: int = 32
    seconds: float = 0.8
    script: str | None = None
    arguments: tuple[str, ...] = ()


SMALL = (
    Scenario("small GET, 32 connections", seconds=2.0),
    Scenario("small GET, 1 connection", connections=1),
    Scenario("small GET, 256 connections", connections=256),
)
VARIED = (Scenario("GET, 20 headers that vary, 32 connections", seconds=2.0, script="varied.lua"),)
POST = (
    Scenario("POST of 1 KB, 32 connections", script="post.lua", arguments=("1024",), seconds=1.0),
)
RESPONSES = (
    Scenario("response of 16 KB, 32 connections", "/16k"),
    Scenario("response of 1 MB, 8 connections", "/1m", connections=8),
    Scenario("chunked response of 16 KB, 32 connections", "/chunked"),
)


def small_get(plan: Plan) -> Found:
    return Found("Outbound, small GET", _run(plan, SMALL))


def varied(plan: Plan) -> Found:
    return Found("Outbound, heads that vary", _run(plan, VARIED))


def post(plan: Plan) -> Found:
    return Found("Outbound, POST", _run(plan, POST))


def responses(plan: Plan) -> Found:
    return Found("Outbound, larger responses", _run(plan, RESPONSES))


def _run(plan: Plan, scenarios: tuple[Scenario, ...]) -> list[Row]:
    rows: list[Row] = []
    with origin() as made, all_outbound(made, made.tls) as contestants:
        for scenario in scenarios:
            if plan.short and scenario.connections > 100:
                continue  # opening them takes longer than all the rest
            subjects = [
                by_wrk(
                    one,
                    made,
                    scenario.path,
                    scenario.connections,
                    plan.seconds(scenario.seconds),
                    scenario.script,
                    scenario.arguments,
                )
                for one in contestants
            ]
            rows += race(scenario.name, subjects, plan.rounds)
    return rows


def targets(plan: Plan) -> Found:
    count = 5 if plan.short else TARGETS
    with origin(targets=count) as made, many_targets(made) as contestants:
        subjects = [
            by_wrk(one, made, "/", 32, plan.seconds(1.0), "targets.lua", (DOMAIN, *made.app_ids))
            for one in contestants
        ]
        rows = race(f"small GET to {count} apps in turn, 32 connections", subjects, plan.rounds)
    return Found("Outbound, many targets", rows)


def latency(plan: Plan) -> Found:
    with origin() as made, all_outbound(made, made.tls) as contestants:
        most = [by_wrk(one, made, "/", 32, plan.seconds(0.5)).turn()["rate"] for one in contestants]
        rate = below(most, 1_000 if plan.short else plan.rate)
        seconds = plan.seconds(2.0)

        def subject(one: Contestant) -> Subject:
            def turn() -> Readings:
                times = h2load(
                    f"http://{one.address}/",
                    rate=rate,
                    seconds=seconds,
                    headers=one.headers,
                    share=0 if plan.short else SHARE,
                )
                return quantiles(times)

            return Subject(one.name, turn)

        subjects = [subject(one) for one in contestants]
        scenario = f"small GET, {rate:,} a second, {rate // PER_CLIENT} connections"
        rows = race(scenario, subjects, plan.rounds)
    return Found("Outbound, latency at a fixed rate", rows)


def below(most: list[float], wanted: int) -> int:
    """Give the `wanted` rate, or less: four tenths of what the slowest subject can do at most."""
    rate = min(wanted, 0.4 * min(most))
    return max(PER_CLIENT, int(rate) // PER_CLIENT * PER_CLIENT)


def quantiles(ordered: list[float]) -> Readings:
    """Give the three quantiles of the times, which are sorted, that the report shows."""
    return {
        "p50_ms": quantile(ordered, 0.5),
        "p99_ms": quantile(ordered, 0.99),
        "p999_ms": quantile(ordered, 0.999),
    }


def new_connections(plan: Plan) -> Found:
    rows: list[Row] = []
    with origin() as made:
        rows += _new("full handshake for each request", plan, made, made.once)
        rows += _new("target resumes sessions", plan, made, made.resuming)
    return Found("Outbound, new connections", rows)


def _new(scenario: str, plan: Plan, made: Origin, port: int) -> list[Row]:
    """The origin closes after each answer, so each request costs a connection."""
    with all_outbound(made, port) as contestants:

        def subject(one: Contestant) -> Subject:
            asked = by_wrk(one, made, "/", 8, plan.seconds(0.8))

            def turn() -> Readings:
                readings = asked.turn()
                return {"cpu_us_connection": readings["cpu_us"], "rate": readings["rate"]}

            return Subject(asked.name, turn)

        subjects = [subject(one) for one in contestants]
        return race(scenario, subjects, plan.rounds)
