"""Who takes part: the mesh and its peers, each on the subject's core, before the same origin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bench import haproxy, nginx
from bench.origin import DOMAIN, Origin
from bench.process import Process
from bench.race import MESH
from bench.sidecar import python, sidecar

NGINX, HAPROXY = "nginx", "HAProxy"
UNTUNED = "nginx, own buffers"
NO_TICKETS = "nginx, no tickets"
"""Whose callers cannot resume their sessions."""

AUTH_REQUEST = "nginx + auth"
"""nginx and the auth service that it asks for each request: nginx mode."""


@dataclass(frozen=True)
class Contestant:
    """Something that takes requests."""

    name: str
    process: Process
    address: str
    headers: tuple[str, ...] = ()
    """What a request to it must have besides what all have."""


@contextlib.contextmanager
def outbound(made: Origin, port: int, env: dict[str, str] | None = None) -> Iterator[Contestant]:
    """The mesh's outbound side, with the origin at `port`."""
    settings = made.caller.env() | {"MESH_GATEWAY": f"fixed/127.0.0.1:{port}"} | (env or {})
    with sidecar(settings, "subject") as process:
        header = f"x-dstack-target-app: {made.target.app_id}"
        yield Contestant(MESH, process, process.bound["outbound"], (header,))


@contextlib.contextmanager
def nginx_outbound(
    made: Origin, port: int, *, connections: int = 4096, tuned: bool = True
) -> Iterator[Contestant]:
    """Run nginx as a client proxy to the origin at `port`."""
    listen = nginx.free_port()
    servers = nginx.client_proxy(listen, port, made.caller, tuned=tuned)
    directory = made.directory / f"proxy-{listen}"
    with nginx.running(directory, servers, "subject", connections=connections) as process:
        yield Contestant(NGINX if tuned else UNTUNED, process, f"127.0.0.1:{listen}")


@contextlib.contextmanager
def haproxy_outbound(made: Origin, port: int) -> Iterator[Contestant]:
    """Run HAProxy as a client proxy to the origin at `port`."""
    listen = nginx.free_port()
    directory = made.directory / f"haproxy-{listen}"
    with haproxy.client_proxy(directory, listen, port, made.caller) as process:
        yield Contestant(HAPROXY, process, f"127.0.0.1:{listen}")


@contextlib.contextmanager
def all_outbound(made: Origin, port: int) -> Iterator[list[Contestant]]:
    """Run the mesh and both client proxies in front of the origin at `port`."""
    with (
        outbound(made, port) as mesh,
        nginx_outbound(made, port) as first,
        haproxy_outbound(made, port) as second,
    ):
        yield [mesh, first, second]


@contextlib.contextmanager
def many_targets(made: Origin) -> Iterator[list[Contestant]]:
    """Run all three in front of `made.many`, where each app has a name and a chain of its own."""
    app_ids = made.app_ids
    ports = nginx.free_port(), nginx.free_port()
    servers = nginx.many_targets_proxy(ports[0], made.many, made.caller, app_ids, DOMAIN)
    env = {"MESH_GATEWAY": DOMAIN, "MESH_GATEWAY_CONNECT": f"127.0.0.1:{made.many}"}
    with (
        outbound(made, made.many, env) as mesh,
        nginx.running(made.directory / "many", servers, "subject") as first,
        haproxy.client_proxy(
            made.directory / "many-haproxy",
            ports[1],
            made.many,
            made.caller,
            {app_id: f"{app_id}-443s.{DOMAIN}" for app_id in app_ids},
        ) as second,
    ):
        yield [
            replace(mesh, headers=()),
            Contestant(NGINX, first, f"127.0.0.1:{ports[0]}"),
            Contestant(HAPROXY, second, f"127.0.0.1:{ports[1]}"),
        ]


@contextlib.contextmanager
def inbound(made: Origin, env: dict[str, str] | None = None) -> Iterator[Contestant]:
    """The mesh's embedded terminator before the plain backend."""
    settings = made.target.env() | {
        "MESH_OUTBOUND_LISTEN": "off",
        "MESH_INBOUND_LISTEN": "127.0.0.1:0",
        "MESH_BACKEND": f"127.0.0.1:{made.plain}",
    }
    with sidecar(settings | (env or {}), "subject") as process:
        yield Contestant(MESH, process, process.bound["inbound"])


@contextlib.contextmanager
def nginx_inbound(
    made: Origin, *, tickets: bool = True, connections: int = 4096, tuned: bool = True
) -> Iterator[Contestant]:
    """nginx, which verifies the callers' chains and checks no more.

    By default it gives each caller two tickets, by which sessions are resumed; the mesh gives one.
    """
    listen = nginx.free_port()
    servers = nginx.terminator(listen, made.plain, made.target, tickets=tickets, tuned=tuned)
    directory = made.directory / f"terminator-{listen}"
    with nginx.running(directory, servers, "subject", connections=connections) as process:
        name = NGINX if tickets else NO_TICKETS
        yield Contestant(name if tuned else UNTUNED, process, f"127.0.0.1:{listen}")


@contextlib.contextmanager
def auth_request_inbound(made: Origin) -> Iterator[Contestant]:
    """nginx mode: nginx with what `nginx-config` prints, and the auth service; counted together."""
    listen = f"127.0.0.1:{nginx.free_port()}"
    directory = made.directory / "auth-request"
    directory.mkdir()
    settings = made.target.env() | {
        "MESH_OUTBOUND_LISTEN": "off",
        "MESH_INBOUND_MODE": "nginx",
        "MESH_INBOUND_LISTEN": listen,
        "MESH_AUTH_LISTEN": f"unix:{directory / 'auth.sock'}",
        "MESH_BACKEND": f"127.0.0.1:{made.plain}",
    }
    env = {"PATH": os.environ.get("PATH", os.defpath), **settings}
    servers = nginx.server_part([python(), "-m", "dstack_mesh"], env)
    with (
        sidecar(settings, "subject") as service,
        nginx.running(Path(directory), servers, "subject") as process,
    ):
        yield Contestant(AUTH_REQUEST, process.together(service), listen)
