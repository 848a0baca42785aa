"""Requests that the mesh is to carry."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator

from dstack_mesh.demo import client
from dstack_mesh.demo.act import Act, Outcome, short
from dstack_mesh.demo.client import Answer
from dstack_mesh.demo.stage import CALLER, TARGET, Stage
from dstack_mesh.sim.messages import Answer as SimAnswer
from dstack_mesh.sim.messages import Request, Response

MEGABYTE = 1_000_000
UPLOAD_BYTES = 50 * MEGABYTE
MEMORY_LIMIT = 16 * MEGABYTE
_PIECE = bytes(range(256)) * 256

EVENTS = 4
EVENT_GAP_SECONDS = 0.25
EVENT_DELAY_LIMIT = 0.2
"""Seconds that an event may take from the backend to the caller: less than to the next one."""

_FORGED = "f" * 40


async def _info(stage: Stage) -> Outcome:
    answer = await client.get(stage.caller.outbound, "/info")
    app_id = answer.field("app_id")
    return Outcome(
        ok=answer.status == 200 and app_id == stage.caller_app.app_id,
        happened=f"{answer}, app_id is {stage.who(app_id)}",
    )


async def _call(stage: Stage) -> Outcome:
    started = time.monotonic()
    answer = await client.get(stage.caller.outbound, "/echo", _to_target(stage))
    milliseconds = (time.monotonic() - started) * 1000
    seen = _callers_seen(answer)
    return Outcome(
        ok=answer.status == 200 and seen == [stage.caller_app.app_id],
        happened=f"{answer} in {milliseconds:.0f} ms\n{_told(stage, seen)}",
    )


async def _forge(stage: Stage) -> Outcome:
    headers = {**_to_target(stage), "X-Dstack-App-Id": _FORGED, "x_dstack_app_id": _FORGED}
    answer = await client.get(stage.caller.outbound, "/echo", headers)
    seen = _callers_seen(answer)
    return Outcome(
        ok=answer.status == 200 and seen == [stage.caller_app.app_id],
        happened=f"{answer}\n{_told(stage, seen)}",
    )


async def _upload(stage: Stage) -> Outcome:
    digest = hashlib.sha256()

    def body() -> Iterator[bytes]:
        left = UPLOAD_BYTES
        while left:
            piece = _PIECE[:left]
            left -= len(piece)
            digest.update(piece)
            yield piece

    before = [sidecar.memory() for sidecar in stage.sidecars]
    started = time.monotonic()
    answer = await client.post(
        stage.caller.outbound, "/upload", _to_target(stage), body(), UPLOAD_BYTES
    )
    seconds = time.monotonic() - started
    after = [sidecar.memory() for sidecar in stage.sidecars]
    growth = [max(b.peak - a.now, 0) for a, b in zip(before, after, strict=True)]
    arrived = answer.field("bytes")
    whole = answer.field("sha256") == digest.hexdigest()
    memory = ", ".join(
        f"{sidecar.name}'s {a.now / MEGABYTE:.1f} → {b.peak / MEGABYTE:.1f} MB"
        for sidecar, a, b in zip(stage.sidecars, before, after, strict=True)
    )
    size = f"{int(arrived) / MEGABYTE:g} MB" if arrived.isdigit() else "nothing"
    return Outcome(
        ok=answer.status == 200 and whole and max(growth) < MEMORY_LIMIT,
        happened=f"{answer}, {size} arrived {'intact' if whole else 'changed'} in {seconds:.1f} s\n"
        f"memory, before → peak: {memory}",
    )


async def _events(stage: Stage) -> Outcome:
    sent: list[float] = []

    async def answer(_: Request) -> SimAnswer:
        return Response(200, [("content-type", "text/event-stream")], stream())

    async def stream() -> AsyncIterator[bytes]:
        for number in range(EVENTS):
            if number:
                await asyncio.sleep(EVENT_GAP_SECONDS)
            sent.append(time.monotonic())
            yield f"data: {number}\n\n".encode()

    stage.backend.on("/ticks", answer)
    lines = client.lines(stage.caller.outbound, "/ticks", _to_target(stage))
    arrived = [time.monotonic() async for line in lines if line.startswith("data:")]
    delays = [late - early for early, late in zip(sent, arrived, strict=False)]
    slowest = max(delays, default=0.0)
    return Outcome(
        ok=len(arrived) == EVENTS and slowest < EVENT_DELAY_LIMIT,
        happened=f"{len(arrived)} events\nthe slowest {slowest * 1000:.1f} ms after it was sent",
    )


def _to_target(stage: Stage) -> dict[str, str]:
    return {"x-dstack-target-app": stage.target_app.app_id}


def _callers_seen(answer: Answer) -> list[str]:
    """Give every caller's app-id that the backend was told, under any spelling of the header."""
    if answer.status != 200:
        return []
    headers = answer.json()["headers"]
    return [v for name, v in headers if name.lower().replace("_", "-") == "x-dstack-app-id"]


def _told(stage: Stage, seen: list[str]) -> str:
    return f"the backend was told: {', '.join(map(stage.who, seen)) or 'nobody'}"


ACTS = (
    Act(
        "guest_agent",
        f"{CALLER} asks its guest agent who it is, through its sidecar",
        f"200 and {CALLER}'s app-id",
        _info,
    ),
    Act(
        "call",
        f"{CALLER} calls {TARGET}",
        f"200, and {TARGET}'s backend is told {CALLER}'s app-id",
        _call,
    ),
    Act(
        "forged_caller",
        f"{CALLER} claims to be another app, {short(_FORGED)}",
        f"the backend is told {CALLER}'s app-id all the same",
        _forge,
    ),
    Act(
        "upload",
        f"{CALLER} uploads {UPLOAD_BYTES // MEGABYTE} MB to {TARGET}",
        f"it streams: each sidecar needs less than {MEMORY_LIMIT // MEGABYTE} MB more",
        _upload,
    ),
    Act(
        "event_stream",
        f"{TARGET} sends {EVENTS} events to {CALLER}, {EVENT_GAP_SECONDS * 1000:.0f} ms apart",
        f"each is passed on at once, within {EVENT_DELAY_LIMIT * 1000:.0f} ms",
        _events,
    ),
)
