"""How long until a sidecar is ready, and what it holds in memory when nothing happens."""

from __future__ import annotations

from bench.plan import Found, Plan
from bench.race import MESH, Row
from bench.sidecar import sidecar
from bench.simulator import simulator


def run(plan: Plan) -> Found:
    """Start it some times, with the simulator's agent to ask for its identity."""
    ready: list[float] = []
    memory: list[float] = []
    with simulator("a,b") as world:
        env = world["apps"]["a"]["env"] | {
            "MESH_BACKEND": "127.0.0.1:9",
            "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
            "MESH_ADMIN_LISTEN": "127.0.0.1:0",
        }
        for _ in range(2 if plan.short else 9):
            with sidecar(env, "subject") as process:
                ready.append(process.ready_seconds)
                memory.append(process.memory_kb() / 1024)
    rows = [
        Row("start of a sidecar", "ready_s", {MESH: ready}),
        Row("start of a sidecar", "idle_mb", {MESH: memory}),
    ]
    return Found("Start", rows)
