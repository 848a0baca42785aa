"""How long until a sidecar is ready, and what it holds in memory when nothing happens."""

from __future__ import annotations

import statistics
from typing import Any

from bench.sidecar import sidecar
from bench.simulator import simulator


def run(*, short: bool) -> dict[str, Any]:
    ready: list[float] = []
    memory: list[float] = []
    with simulator("a,b") as world:
        env = {
            **world["apps"]["a"]["env"],
            "MESH_BACKEND": "127.0.0.1:9",
            "MESH_OUTBOUND_LISTEN": "127.0.0.1:0",
            "MESH_ADMIN_LISTEN": "127.0.0.1:0",
        }
        for _ in range(2 if short else 9):
            with sidecar(env) as process:
                ready.append(process.ready_seconds)
                memory.append(process.rss_mb())
    return {
        "ready after (s, median)": round(statistics.median(ready), 3),
        "resident memory when idle (MB, median)": round(statistics.median(memory), 1),
    }
