"""The list of the parts, in the order in which they run."""

from __future__ import annotations

from bench import hostile
from bench.parts import bulk, chain, idle, inbound, outbound, startup, workers
from bench.plan import Found, Part, Plan

_PROXIES = ("nginx", "haproxy")


def _hostile(plan: Plan) -> Found:
    return Found("Hostile clients beside a well-behaved one", plain=hostile.run(short=plan.short))


PARTS = {
    part.name: part
    for part in (
        Part("small-get", "outbound, small GET: 32, 1 and 256 connections", outbound.small_get,
             (*_PROXIES, "wrk")),
        Part("varied", "outbound, GET whose 20 headers vary", outbound.varied, (*_PROXIES, "wrk")),
        Part("post", "outbound, POST of 1 KB", outbound.post, (*_PROXIES, "wrk")),
        Part("responses", "outbound, 16 KB, 1 MB and chunked", outbound.responses,
             (*_PROXIES, "wrk")),
        Part("targets", "outbound, 50 target apps in turn", outbound.targets, (*_PROXIES, "wrk")),
        Part("latency", "outbound, quantiles at a fixed rate", outbound.latency,
             (*_PROXIES, "h2load", "wrk")),
        Part("new-outbound", "outbound, a connection for each request", outbound.new_connections,
             (*_PROXIES, "wrk")),
        Part("inbound", "inbound: GET and 16 KB, beside nginx and nginx mode",
             inbound.small_requests, ("nginx",)),
        Part("latency-inbound", "inbound, quantiles at a fixed rate", inbound.latency, ("nginx",)),
        Part("new-inbound", "inbound, CPU of a handshake", inbound.new_connections, ("nginx",)),
        Part("chain", "two sidecars, direct and through the gateway", chain.run, ("nginx", "wrk")),
        Part("bodies", "100 MB each way, both directions", bulk.bodies, (*_PROXIES, "curl")),
        Part("memory", "peak memory while 512 MB pass through", bulk.memory, ("nginx", "curl")),
        Part("idle", "memory of 10,000 idle connections", idle.run, ("nginx",)),
        Part("workers", "two workers beside one", workers.run, ("nginx", "wrk")),
        Part("startup", "time to start, memory when idle", startup.run),
        Part("hostile", "10,000 idle and 1,000 dripping connections", _hostile, ("nginx",)),
    )
}  # fmt: skip
