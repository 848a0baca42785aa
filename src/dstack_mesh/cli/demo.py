"""`dstack-mesh demo`: a whole mesh of two apps on this machine, with real requests through it."""

from __future__ import annotations

import asyncio
import codecs
import io
import signal
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dstack_mesh.demo.play import Demo

_DONE, _FAILED, _INTERRUPTED = 0, 1, 130

_PLAIN = {"→": ">", "⇒": "=", "…": ".", "✓": "+", "✗": "x", "─": "-"}
"""As wide as what they stand for."""


@click.command
@click.option("--keep", is_flag=True, help="Leave it running until Ctrl-C, with lines to try.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def demo(*, keep: bool, as_json: bool) -> int:
    """Show a whole mesh of two apps on this machine.

    Starts a simulated KMS, guest agents and a gateway, two sidecars as processes of their own and
    a backend; sends requests and attacks through it; and shows what happened. Exit status 0 only
    if each did what it should. Nothing is left behind.
    """
    # All of the simulator and what draws tables: no other command is to wait for these.
    from dstack_mesh.demo.play import Demo
    from dstack_mesh.demo.report import JsonDisplay
    from dstack_mesh.demo.stage import StageError

    _never_fail_to_encode()
    try:
        if as_json:
            return asyncio.run(_run(Demo(JsonDisplay(click.echo, keep=keep), keep=keep)))

        from rich.console import Console

        from dstack_mesh.demo.table import TableDisplay

        with TableDisplay(Console(highlight=False)) as display:
            return asyncio.run(_run(Demo(display, keep=keep)))
    except StageError as error:
        raise click.ClickException(f"demo: {error}") from error


async def _run(one: Demo) -> int:
    """Run until it ends or a signal comes, and clean up in either case; give the exit status."""
    received: list[signal.Signals] = []
    task = asyncio.ensure_future(one.run())

    def stop(number: signal.Signals) -> None:
        if not received:  # a second one must not keep us from cleaning up
            received.append(number)
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not received:
            raise
    if signal.SIGINT in received:
        return _INTERRUPTED
    if received and not one.complete:
        click.echo(f"dstack-mesh: {received[0].name} came before all was tried", err=True)
    return _DONE if one.ok else _FAILED


def _never_fail_to_encode() -> None:
    """Let output in an encoding without arrows and check marks have plain ones instead."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end

    codecs.register_error("dstack_mesh_plain", plain)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="dstack_mesh_plain")
