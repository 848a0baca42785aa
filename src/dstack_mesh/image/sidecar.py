"""From the settings to the processes of one container: who runs what, with which rights.

The mesh runs as a user of its own without any capability. What of the host's only root can reach,
it gets through a bridge (the guest agent's socket) or as a copy (the gateways' URLs).
"""

from __future__ import annotations

import asyncio
import os
import pwd
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dstack_mesh.cli.options import load
from dstack_mesh.cli.run import run
from dstack_mesh.image import layout
from dstack_mesh.image.access import READ, WRITE, Access, access
from dstack_mesh.image.environment import with_defaults, with_older_names
from dstack_mesh.image.layout import LayoutError, Owner
from dstack_mesh.image.privileges import User, as_user, needs_low_ports
from dstack_mesh.image.supervisor import Command, Supervisor
from dstack_mesh.model import Address, UnixAddress
from dstack_mesh.ops import logs
from dstack_mesh.settings.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dstack_mesh.settings.tree import Settings

MESH_USER, NGINX_USER = "mesh", "mesh-nginx"
_FAILED, _WRONG_USAGE = 1, 2
_BRIDGE = (sys.executable, "-m", "dstack_mesh.image.bridge")


@dataclass(slots=True)
class Plan:
    """What is to run, as far as it is decided."""

    settings: Settings
    as_root: bool
    mesh: User
    nginx: User
    flags: list[str] = field(default_factory=list)
    """For the mesh, after those that were given: they win."""

    commands: list[Command] = field(default_factory=list)
    """What runs beside the mesh."""

    groups: set[int] = field(default_factory=set)
    """Groups that the mesh has to be in."""

    has_state: bool = False

    @property
    def has_front(self) -> bool:
        """Whether nginx is in front of the mesh; without a backend there is nothing behind it."""
        inbound = self.settings.inbound
        return inbound.mode == "nginx" and None not in (inbound.backend, inbound.listen)


def run_sidecar(args: Sequence[str], mesh: Sequence[str]) -> int:
    """Run `mesh run` with `args`, and what it needs beside it; the exit status at the end.

    Where the mesh alone is needed this process becomes it, and there is no return.
    """
    try:
        settings = _load(args)
        plan = _plan(settings)
        if plan.has_front:
            _make_front(plan)
    except click.exceptions.Exit as done:  # of `--help`
        return done.exit_code
    except click.UsageError as error:
        error.show()
        return _WRONG_USAGE
    except SettingsError as error:
        return _say(str(error), _WRONG_USAGE)
    except (LayoutError, OSError) as error:
        return _say(str(error), _FAILED)
    argv = [*mesh, "run", *args, *plan.flags]
    if plan.as_root:
        user = User(plan.mesh.uid, plan.mesh.gid, frozenset(plan.groups))
        argv = as_user(user, argv, low_ports=needs_low_ports(_listeners(plan)))
    if not plan.commands and not plan.has_front:
        os.execvp(argv[0], argv)  # noqa: S606 - our own command line
    logs.setup(settings.log.format, settings.log.level)
    commands = [*plan.commands, Command("mesh", argv, os.environ)]
    factory = None
    if plan.has_front:
        import uvloop  # only now: without nginx this process stays at two thirds of the size

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(_supervise(plan, commands))


async def _supervise(plan: Plan, commands: Sequence[Command]) -> int:
    front = None
    if plan.has_front:
        from dstack_mesh.image.front import Front
        from dstack_mesh.image.identity_files import IdentityFiles

        files = IdentityFiles(layout.IDENTITY, _owner(plan, plan.nginx.uid, plan.nginx.gid))
        front = Front(
            *(plan.settings, files, layout.NGINX_CONFIG, layout.NGINX),
            lambda argv: _as_nginx(plan, argv),
        )
    return await Supervisor(commands, front, plan.settings.drain_timeout).run()


def _load(args: Sequence[str]) -> Settings:
    """Give the settings, and put the image's defaults into this process's environment."""
    context = run.make_context("dstack-mesh", list(args))
    flags = {
        name: value
        for name, value in context.params.items()
        if name not in ("config", "ready_file")
    }
    config = context.params["config"]
    environ = with_older_names(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    os.environ.update(with_defaults(environ, load(config, flags).sources))
    return load(config, flags).settings


def _plan(settings: Settings) -> Plan:
    as_root = os.geteuid() == 0
    plan = Plan(settings, as_root, _user(MESH_USER, as_root), _user(NGINX_USER, as_root))
    if as_root:
        _reach_agent(plan)
        _reach_sys_config(plan)
    return plan


def _user(name: str, as_root: bool) -> User:
    if not as_root:
        return User(os.geteuid(), os.getegid())
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise LayoutError(f"there is no user {name} here: this is the entry of the image") from None
    return User(found.pw_uid, found.pw_gid)


def _reach_agent(plan: Plan) -> None:
    """See to it that the mesh reaches the guest agent's socket, whatever its mode."""
    agent = plan.settings.dstack.agent
    if not isinstance(agent, UnixAddress):
        return
    # A socket that is not there yet may get any mode: the agents of CVMs are root's.
    found = access(agent.path, WRITE) or Access(only_by=(0, 0))
    plan.groups |= found.groups
    if found.only_by is None:
        return
    uid, gid = found.only_by
    _state(plan)
    layout.make_directory(layout.AGENT_SOCKET.parent, Owner(uid, plan.mesh.gid), 0o2710)
    bridge = [*_BRIDGE, str(layout.AGENT_SOCKET), agent.path]
    plan.commands.append(Command("bridge", as_user(User(uid, gid), bridge), os.environ))
    plan.flags += ["--agent-address", f"unix:{layout.AGENT_SOCKET}"]


def _reach_sys_config(plan: Plan) -> None:
    """See to it that the mesh can read the gateways' URLs; they do not change while a CVM runs."""
    path = plan.settings.dstack.sys_config
    found = access(path, READ)
    if found is None:
        return
    plan.groups |= found.groups
    if found.only_by is None:
        return
    _state(plan)
    layout.make_directory(layout.SYS_CONFIG.parent, Owner(0, plan.mesh.gid), 0o750)
    layout.SYS_CONFIG.write_bytes(Path(path).read_bytes())
    layout.SYS_CONFIG.chmod(0o644)
    plan.flags += ["--sys-config", str(layout.SYS_CONFIG)]


def _make_front(plan: Plan) -> None:
    _state(plan)
    mesh, nginx = plan.mesh, plan.nginx
    layout.make_directory(layout.AUTH_SOCKET.parent, _owner(plan, mesh.uid, nginx.gid), 0o2710)
    for path in (layout.IDENTITY, layout.NGINX_CONFIG.parent):
        layout.make_directory(path, _owner(plan, -1, nginx.gid), 0o750)
    layout.make_directory(layout.NGINX, _owner(plan, nginx.uid, nginx.gid), 0o700)


def _state(plan: Plan) -> None:
    if not plan.has_state:
        layout.make_state()
        plan.has_state = True


def _owner(plan: Plan, uid: int, gid: int) -> Owner | None:
    return Owner(uid, gid) if plan.as_root else None


def _as_nginx(plan: Plan, argv: Sequence[str]) -> list[str]:
    if not plan.as_root:
        return list(argv)
    low_ports = needs_low_ports([plan.settings.inbound.listen])
    return as_user(plan.nginx, argv, low_ports=low_ports)


def _listeners(plan: Plan) -> list[Address | None]:
    settings = plan.settings
    inbound = settings.inbound.listen if settings.inbound.mode == "embedded" else None
    return [settings.outbound.listen, settings.admin.listen, inbound]


def _say(line: str, status: int) -> int:
    print(f"dstack-mesh: {line}", file=sys.stderr)  # noqa: T201 - for the person who started it
    return status
