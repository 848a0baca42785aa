"""`dstack-mesh await`: wait until the mesh on this machine is ready, then go on.

It is an image's health check, started anew every few seconds, so it imports next to nothing:
asking is done on a bare socket, since `http.client` alone takes a third of the time that all of
this does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dstack_mesh.listen import reachable
from dstack_mesh.model import TcpAddress
from dstack_mesh.settings import parse

if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

    from dstack_mesh.model import Address

DEFAULT_TIMEOUT = "60s"
PAUSE = 0.2
"""Seconds between two questions."""

ONE_ANSWER = 5.0
"""Seconds that one answer may take. `/readyz` waits for nothing, so it comes at once or not."""

_MAX_ANSWER = 64 * 1024
_DEFAULT_ADMIN = "127.0.0.1:8093"
_TERMINATED = 128 + signal.SIGTERM


class NotReadyError(Exception):
    """Why the mesh is not ready, for the reader."""


class _WrongUsage(click.ClickException):
    """One line on standard error, exit status 2."""

    exit_code = 2


@click.command("await")
@click.option(
    "--timeout",
    default=DEFAULT_TIMEOUT,
    show_default=True,
    metavar="S",
    help="How long to wait: 250ms, 30s, 5m or plain seconds; 0 asks once.",
)
@click.option(
    "--admin-listen",
    metavar="ADDR",
    help="The mesh's admin listener. [MESH_ADMIN_LISTEN; default: " + _DEFAULT_ADMIN + "]",
)
@click.option("-c", "--config", type=click.Path(path_type=Path), help="The settings file (TOML).")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def await_mesh(
    timeout: str, admin_listen: str | None, config: Path | None, command: tuple[str, ...]
) -> int:
    """Wait until the mesh is ready (/readyz); then run COMMAND in this process's place, if any.

    Write `--` before a COMMAND. Exit status: 0 ready, 1 the time is over or COMMAND cannot be run,
    2 wrong usage, 130 interrupted; or COMMAND's own.
    """
    # As a container's first process it would have SIGTERM ignored, and `docker stop` wait.
    signal.signal(signal.SIGTERM, _terminated)
    address = _admin_address(admin_listen, config)
    if (reason := wait(address, _seconds(timeout))) is not None:
        raise click.ClickException(f"not ready within {timeout}: {reason}")
    if command:
        _replace_by(command)
    return 0


def wait(address: Address, seconds: float) -> str | None:
    """Ask until the mesh is ready or `seconds` are over; give None, or the last reason.

    Each new reason is told on standard error while there is time left.
    """
    end = time.monotonic() + seconds
    told = None
    while True:
        try:
            ask(address, max(PAUSE, min(ONE_ANSWER, end - time.monotonic())))
        except NotReadyError as error:
            reason = str(error)
        else:
            return None
        left = end - time.monotonic()
        if left <= 0:
            return reason
        if reason != told:
            click.echo(f"dstack-mesh: waiting: {reason}", err=True)
            told = reason
        time.sleep(min(PAUSE, left))


def ask(address: Address, seconds: float) -> None:
    """Ask `/readyz` once, within about `seconds`. Raises `NotReadyError`."""
    try:
        status, body = _get(address, seconds)
    except TimeoutError:
        raise NotReadyError(f"{address} does not answer within {seconds:.1f} s") from None
    except OSError as error:
        raise NotReadyError(
            f"no mesh answers on {address} ({error.strerror or error}): is it running there?"
        ) from None
    if status == 200:
        return
    if status != 503:
        raise NotReadyError(f"what answers on {address} is no mesh's admin listener ({status})")
    raise NotReadyError(_reasons(body) or "it says that it is not ready")


def _get(address: Address, seconds: float) -> tuple[int, bytes]:
    """Give status and body of `/readyz`; a status of 0 is no HTTP."""
    end = time.monotonic() + seconds
    request = b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n"
    with _connect(address, seconds) as sock:
        sock.sendall(request)
        answer = b""
        while len(answer) < _MAX_ANSWER:
            sock.settimeout(max(0.001, end - time.monotonic()))
            if not (piece := sock.recv(_MAX_ANSWER)):
                break
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(None, 2)
    is_http = len(words) > 1 and words[0].startswith(b"HTTP/1.") and words[1].isdigit()
    return int(words[1]) if is_http else 0, body


def _connect(address: Address, seconds: float) -> socket.socket:
    if isinstance(address, TcpAddress):
        return socket.create_connection((address.host, address.port), seconds)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(seconds)
    try:
        sock.connect(address.path)
    except BaseException:
        sock.close()
        raise
    return sock


def _reasons(body: bytes) -> str:
    """Give the reasons in a report of `/readyz`; empty where it is none."""
    try:
        checks = json.loads(body)["checks"].items()
        return "; ".join(f"{name}: {one['reason']}" for name, one in checks if not one["ok"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def _admin_address(flag: str | None, config: Path | None) -> Address:
    """Find the address the way `run` does: flag, environment, file, default."""
    name, text = "--admin-listen", flag
    if text is None:
        name, text = "MESH_ADMIN_LISTEN", os.environ.get("MESH_ADMIN_LISTEN") or None
    if text is None and config is not None:
        from dstack_mesh.settings import toml_file

        name, text = f"admin.listen in {config}", toml_file.read(config).values.get("admin.listen")
    text = text or _DEFAULT_ADMIN
    try:
        address = parse.listen(text)
    except ValueError:
        raise _WrongUsage(
            f"{name} is {json.dumps(text)}: accepted is host:port, [ipv6]:port or unix:/path"
        ) from None
    if address is None:
        raise _WrongUsage(f"{name} is off: a mesh without an admin listener cannot be waited for")
    if isinstance(address, TcpAddress) and address.port == 0:
        raise _WrongUsage(f"{name} is {text}, any free port: say which one the mesh has taken")
    return reachable(address)


def _seconds(text: str) -> float:
    try:
        return parse.duration_or_none(text)
    except ValueError:
        raise _WrongUsage(
            f"--timeout is {json.dumps(text)}: accepted is a time such as 250ms, 30s, 5m or plain"
            " seconds; 0 asks once"
        ) from None


def _replace_by(command: tuple[str, ...]) -> NoReturn:
    # Python ignores SIGPIPE, and what it ignores stays ignored in COMMAND, where it is not meant.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(command[0], command)  # noqa: S606 - what the caller asked for, without a shell
    except OSError as error:
        raise click.ClickException(f"cannot run {command[0]}: {error.strerror}") from error


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(_TERMINATED)
