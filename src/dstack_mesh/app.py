"""The process, or processes, that `dstack-mesh run` is."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from dstack_mesh import lifecycle, listen, memory, reload
from dstack_mesh.bindings import bind_all, bound_addresses
from dstack_mesh.log import event
from dstack_mesh.ops.systemd import Notifier
from dstack_mesh.settings.load import Loaded
from dstack_mesh.sidecar import Sidecar
from dstack_mesh.workers.reread import Reread
from dstack_mesh.workers.seat import Line, Seat
from dstack_mesh.workers.supervisor import Supervisor

log = logging.getLogger(__name__)


def run(loaded: Loaded, ready_file: Path | None) -> int:
    """Run one sidecar until it is told to end; give the process's exit status."""
    lifecycle.allow_many_files()
    memory.keep_heap()
    try:
        if loaded.settings.workers > 1:
            return _supervise(loaded, ready_file)
        return _run_loop(loaded, ready_file)
    except listen.ListenError as error:
        print(f"dstack-mesh: {error}", file=sys.stderr)  # noqa: T201 - for the person who started it
        return 1


def _supervise(loaded: Loaded, ready_file: Path | None) -> int:
    sockets: dict[str, listen.ListeningSocket] = {}
    reread = Reread(loaded)
    try:
        bind_all(loaded.settings, sockets)
        supervisor = Supervisor(
            loaded.settings,
            sockets,
            work=lambda seat: _run_worker(reread, seat),
            reread=reread,
            notifier=Notifier.from_environ(os.environ),
            ready_file=ready_file,
            bound=bound_addresses(sockets),
        )
        return supervisor.run()
    finally:
        for sock in sockets.values():
            sock.close()
            listen.unlink_if_ours(sock)


def _run_loop(loaded: Loaded, ready_file: Path | None) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_alone(loaded, ready_file))


async def _alone(loaded: Loaded, ready_file: Path | None) -> int:
    loop = asyncio.get_running_loop()
    sidecar = Sidecar(loaded.settings)
    notifier = Notifier.from_environ(os.environ)
    reloader = reload.Reloader(loaded, sidecar.reloadable(), notifier)
    signals = lifecycle.Signals(loop, reloader.ask)
    _hear_announcement(loop, sidecar)
    return await _serve(sidecar, signals, reloader, notifier, ready_file)


def _run_worker(reread: Reread, seat: Seat) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_one_of_several(reread, seat))


async def _one_of_several(reread: Reread, seat: Seat) -> int:
    loop = asyncio.get_running_loop()
    sidecar = Sidecar(reread.settings(), seat)
    parts = (*sidecar.reloadable(), seat.reload_part())
    reloader = reload.Reloader(reread.started, parts, seat.line, reread.current)
    signals = lifecycle.Signals(loop, reloader.ask, second_ends=False)

    _hear_announcement(loop, sidecar)

    def orphaned() -> None:
        sidecar.leave_listeners()  # to a successor of our supervisor's
        signals.end(0)

    seat.watch_supervisor(loop, orphaned)
    return await _serve(sidecar, signals, reloader, seat.line, None)


def _hear_announcement(loop: asyncio.AbstractEventLoop, sidecar: Sidecar) -> None:
    # From who ends nginx in front of us first: it has to be seen that this one is ending.
    loop.add_signal_handler(signal.SIGUSR1, sidecar.announce_end)


async def _serve(
    sidecar: Sidecar,
    signals: lifecycle.Signals,
    reloader: reload.Reloader,
    notifier: Notifier | Line,
    ready_file: Path | None,
) -> int:
    loop = asyncio.get_running_loop()
    collector = memory.Collector(loop, sidecar.open_connections)
    try:
        await sidecar.start()
        if ready_file is not None:
            # Left by a process that was killed. Not before the listeners are ours: another sidecar
            # may be running, and the file be its own.
            lifecycle.remove_ready_file(ready_file)
        notifier.start(loop, sidecar.status)
        announced = asyncio.create_task(
            _announce(sidecar, signals, notifier, ready_file, collector)
        )
        reloading = asyncio.create_task(reloader.run())
        try:
            await signals.wait()
        finally:
            announced.cancel()
            reloading.cancel()
            await asyncio.gather(announced, reloading, return_exceptions=True)
        notifier.stopping()
        await sidecar.drain()
        if ready_file is not None:
            lifecycle.remove_ready_file(ready_file)
    finally:
        collector.stop()
        await sidecar.stop()
        notifier.close()
    return signals.exit_status


async def _announce(
    sidecar: Sidecar,
    signals: lifecycle.Signals,
    notifier: Notifier | Line,
    ready_file: Path | None,
    collector: memory.Collector,
) -> None:
    await sidecar.wait_open()
    collector.start()
    if ready_file is not None:
        try:
            lifecycle.write_ready_file(ready_file, sidecar.bound())
        except OSError as error:
            # Whoever waits for the file would wait for ever.
            event(log, logging.ERROR, "ready_file_failed", path=str(ready_file), reason=str(error))
            signals.end(1)
            return
    notifier.ready()
