"""A stage on which nothing runs, for what only shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from dstack_mesh.demo.act import Act, Outcome, Result


@dataclass
class FakeSidecar:
    name: str
    pid: int
    outbound: str
    admin: str
    log: Path = Path("/tmp/dstack-demo-x/shop/sidecar.log")


@dataclass
class FakeStage:
    caller: FakeSidecar = field(
        default_factory=lambda: FakeSidecar("shop", 101, "127.0.0.1:1001", "127.0.0.1:1002")
    )
    target: FakeSidecar = field(
        default_factory=lambda: FakeSidecar("billing", 102, "127.0.0.1:2001", "127.0.0.1:2002")
    )
    caller_app: SimpleNamespace = field(default_factory=lambda: app("shop", "a"))
    target_app: SimpleNamespace = field(default_factory=lambda: app("billing", "b"))
    other_app_id: str = "c" * 40


def app(name: str, digit: str) -> SimpleNamespace:
    env = {"MESH_INBOUND_LISTEN": "127.1.2.3:3000"}
    return SimpleNamespace(name=name, app_id=digit * 40, env=env)


async def never(_: object) -> Outcome:
    raise AssertionError("only shown, never run")


def result(act: Act, *, ok: bool = True, happened: str = "200 in 4 ms\nas it should") -> Result:
    return Result(act, Outcome(ok, happened), 0.25)
