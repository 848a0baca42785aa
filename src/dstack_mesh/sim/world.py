"""A whole dstack on one machine: a KMS, a gateway, and for each app a guest agent and its files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dstack_mesh.model import AppId, InstanceId, TcpAddress, UnixAddress
from dstack_mesh.sim.agent import GuestAgent
from dstack_mesh.sim.gateway import Gateway
from dstack_mesh.sim.http import refuse_live_socket
from dstack_mesh.sim.kms import Kms
from dstack_mesh.sim.ports import common_port, is_local, loopback_host

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

BASE_DOMAIN = "sim.dstack.test"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")
_SOCKET_PATH_LIMIT = 107
"""Bytes of a unix socket's path on Linux: `sun_path` has 108, the last one is zero."""


class WorldError(Exception):
    """The simulator can't be set up like this; the text says why and what to do."""


class BadWorldError(WorldError):
    """An app's name, a host or an address, as the user gave it, is of no use."""


@dataclass(frozen=True, slots=True)
class SimApp:
    """One app of the simulated world, with one instance."""

    name: str
    app_id: AppId
    instance_id: InstanceId
    directory: Path
    """Holds `dstack.sock`, `sys-config.json` and `env`."""

    host: str
    """Where the gateway sends the app's connections."""

    agent: GuestAgent
    env: dict[str, str]
    """The environment for the app's sidecar; all but `MESH_BACKEND`."""


def app_id_of(name: str) -> AppId:
    """The app-id of a simulated app: the same in every run."""
    return AppId(_id("app", name))


def instance_id_of(name: str) -> InstanceId:
    """The instance-id of a simulated app's one instance."""
    return InstanceId(_id("instance", name))


def _id(kind: str, name: str) -> str:
    return hashlib.sha256(f"dstack-mesh simulator/{kind}/{name}".encode()).hexdigest()[:40]


def parse_app(text: str) -> tuple[str, str | None]:
    """Split `NAME` or `NAME=HOST`. Raises `BadWorldError`."""
    name, equals, host = text.strip().partition("=")
    if not _NAME.fullmatch(name):
        raise BadWorldError(
            f"app {name!r}: a name is 1 to 32 letters, digits, - and _, "
            "beginning with a letter or digit"
        )
    if equals and not _HOST.fullmatch(host):
        raise BadWorldError(f"app {name!r}: {host!r} is not a host name or IP address")
    return name, host if equals else None


def parse_listen(text: str) -> tuple[str, int]:
    """Split `HOST` or `HOST:PORT`, an IPv6 address with a port in brackets; port 0 is any.

    Raises `BadWorldError`.
    """
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        return text, 0
    if not (port.isascii() and port.isdigit() and int(port) < 65_536):
        raise BadWorldError(f"listen address {text!r}: {port!r} is not a port from 0 to 65535")
    return host.strip("[]"), int(port)


class World:
    """Use as `async with World(["a", "b"]) as world:`; `world.apps["a"]` is then running.

    Parameters:
        apps: `NAME` or `NAME=HOST` each.
        directory: made if need be and kept; None is a new one that is removed at the end.
        listen: the host on which the gateway listens, as the sidecars reach it, and the port.
        seed: keys follow from it; the same KMS in each run by giving the same. Random if None.

    Raises `WorldError` (from `start`) where it can't be set up; nothing is left running then.

    """

    def __init__(
        self,
        apps: Sequence[str],
        directory: Path | None = None,
        *,
        listen: str = "127.0.0.1",
        base_domain: str = BASE_DOMAIN,
        seed: bytes | None = None,
    ) -> None:
        self._wanted = [parse_app(text) for text in apps]
        names = [name for name, _ in self._wanted]
        if not names:
            raise BadWorldError("no app is named: give at least one")
        if double := next((name for name in names if names.count(name) > 1), None):
            raise BadWorldError(f"app {double!r} is named twice")
        self._listen, self._port = parse_listen(listen)
        if self._listen in {"0.0.0.0", "::", ""}:  # noqa: S104 - it is what is refused here
            raise BadWorldError(
                f"listen address {listen!r}: sidecars connect to it by this name, "
                "so give one address or host name"
            )
        self._given = directory
        self.directory = Path()
        self.kms = Kms.create(seed)
        self.gateway = Gateway(base_domain)
        self.apps: dict[str, SimApp] = {}
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Start every part. Raises `WorldError`."""
        try:
            self._take_directory()
            self._stack.push_async_callback(self.gateway.aclose)
            await self.gateway.start(self._listen, self._port)
            hosts = self._hosts()
            local = [host for host in hosts.values() if is_local(host)]
            inbound = common_port(local or ["127.0.0.1"])
            taken = {inbound}
            for name, host in hosts.items():
                await self._start_app(name, host, inbound, taken)
        except OSError as error:
            await self.aclose()
            raise WorldError(str(error)) from error
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Stop every part, remove the sockets, and the directory if it was made for this."""
        await self._stack.aclose()
        self.apps.clear()

    def describe(self) -> dict[str, object]:
        """Everything that a script needs, as JSON can hold it."""
        return {
            "dir": str(self.directory),
            "base_domain": self.gateway.base_domain,
            "gateway": str(self.gateway.address),
            "gateway_info": self.gateway.info_url,
            "apps": {
                app.name: {
                    "app_id": app.app_id,
                    "instance_id": app.instance_id,
                    "host": app.host,
                    "dir": str(app.directory),
                    "env": app.env,
                }
                for app in self.apps.values()
            },
        }

    def _take_directory(self) -> None:
        """Make the directory ours for as long as we run, by a lock that no crash leaves behind."""
        if self._given is None:
            self.directory = Path(tempfile.mkdtemp(prefix="dstack-sim-"))
            self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        else:
            self.directory = self._given.absolute()
            self.directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        self._stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorldError(
                f"{self.directory}: a simulator already runs here; stop it or use another --dir"
            ) from None

    def _hosts(self) -> dict[str, str]:
        """Return each app's host: the one given, or a loopback address of its own."""
        found = {name: host for name, host in self._wanted if host is not None}
        for name, host in self._wanted:
            if host is None:
                found[name] = loopback_host(app_id_of(name), set(found.values()))
        return {name: found[name] for name, _ in self._wanted}

    async def _start_app(self, name: str, host: str, inbound: int, taken: set[int]) -> None:
        directory = self.directory / name
        directory.mkdir(exist_ok=True)
        socket = directory / "dstack.sock"
        size = len(os.fsencode(socket))
        if size > _SOCKET_PATH_LIMIT:
            raise WorldError(
                f"{socket}: a unix socket's path may have {_SOCKET_PATH_LIMIT} bytes and this one "
                f"has {size}; use a shorter --dir"
            )
        await refuse_live_socket(str(socket))
        app_id, instance_id = app_id_of(name), instance_id_of(name)
        agent = GuestAgent(self.kms, app_id, instance_id, app_name=name)
        self._stack.push_async_callback(agent.aclose)
        await agent.start(UnixAddress(str(socket)))
        for identifier in (app_id, instance_id):
            self.gateway.add_route(identifier, host)
        config = directory / "sys-config.json"
        config.write_text(json.dumps({"gateway_urls": [self.gateway.info_url]}) + "\n")
        ports = []
        for _ in range(2):
            ports.append(common_port(["127.0.0.1"], taken))
            taken.add(ports[-1])
        env = {
            "DSTACK_AGENT_ADDRESS": f"unix:{socket}",
            "MESH_SYS_CONFIG": str(config),
            "MESH_GATEWAY_CONNECT": str(self.gateway.address),
            "MESH_INBOUND_LISTEN": str(TcpAddress(_inbound_host(host), inbound)),
            "MESH_OUTBOUND_LISTEN": f"127.0.0.1:{ports[0]}",
            "MESH_DEFAULT_PORT": str(inbound),
            "MESH_ADMIN_LISTEN": f"127.0.0.1:{ports[1]}",
        }
        lines = [f"export {key}={shlex.quote(value)}\n" for key, value in env.items()]
        (directory / "env").write_text("".join(lines))
        self.apps[name] = SimApp(name, app_id, instance_id, directory, host, agent, env)


def _inbound_host(host: str) -> str:
    """Return where the sidecar of an app at `host` listens: there, or everywhere for a name."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return "0.0.0.0"  # noqa: S104 - the name's address is known only where the sidecar runs
