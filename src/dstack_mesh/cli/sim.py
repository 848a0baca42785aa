"""`dstack-mesh sim`: KMS, guest agents and gateway for development, until stopped."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dstack_mesh.sim.world import SimApp, World


class _UsageError(click.ClickException):
    """One line on standard error, exit status 2."""

    exit_code = 2


@click.command()
@click.option(
    "--apps",
    required=True,
    metavar="NAME[,NAME…]",
    help="The apps, each NAME or NAME=HOST, to have the gateway route to that host.",
)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where each app's socket and files are put; kept at the end. "
    "Default: a temporary one, removed at the end.",
)
@click.option(
    "--listen",
    default="127.0.0.1",
    show_default=True,
    metavar="HOST[:PORT]",
    help="The host that the gateway listens on, as the sidecars reach it. Default: any free port.",
)
@click.option(
    "--seed",
    metavar="TEXT",
    help="The KMS's keys follow from it, and stay the same from run to run. Default: new ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of shell.")
def sim(apps: str, directory: Path | None, listen: str, seed: str | None, *, as_json: bool) -> None:
    """Run a dstack world on this machine until it is stopped.

    Each app gets DIR/NAME/dstack.sock (a guest agent), DIR/NAME/sys-config.json, DIR/NAME/env
    (what its sidecar needs) and a loopback address to which the gateway routes it.
    """
    # The simulator's own imports take a while; the other commands do without them.
    from dstack_mesh.sim.world import BadWorldError, World, WorldError

    try:
        key = None if seed is None else seed.encode()
        world = World(apps.split(","), directory, listen=listen, seed=key)
        stopped_by = asyncio.run(_run(world, as_json=as_json))
    except BadWorldError as error:
        raise _UsageError(str(error)) from error
    except WorldError as error:
        raise click.ClickException(str(error)) from error
    if stopped_by == signal.SIGINT:
        raise click.exceptions.Exit(130)


async def _run(world: World, *, as_json: bool) -> signal.Signals:
    """Run until a signal; the first of SIGINT and SIGTERM is returned."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    async with world:
        click.echo(json.dumps(world.describe()) if as_json else _shown(world))
        return await stopped


def _shown(world: World) -> str:
    """Shell to read and to paste: a block for each app, and then what to do with it."""
    lines = [
        f"# dstack simulator: gateway {world.gateway.address} for *.{world.gateway.base_domain}",
        f"# files in {world.directory}",
    ]
    for app in world.apps.values():
        lines += ["", f"# {app.name}: app {app.app_id}, instance {app.instance_id}, at {app.host}"]
        lines += (app.directory / "env").read_text().splitlines()
    apps = list(world.apps.values())
    lines += ["", "# To try, each line in a shell of its own:"]
    lines += [
        f"#   . {shlex.quote(str(app.directory))}/env; MESH_BACKEND=127.0.0.1:8080 dstack-mesh run"
        for app in apps
    ]
    lines += ["# and then:", f"#   {_curl(apps[0], apps[-1])}", "# Ctrl-C ends the simulator."]
    return "\n".join(lines)


def _curl(caller: SimApp, target: SimApp) -> str:
    outbound = caller.env["MESH_OUTBOUND_LISTEN"]
    return f"curl -i -H 'x-dstack-target-app: {target.app_id}' http://{outbound}/"
