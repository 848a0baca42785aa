"""`python -m dstack_mesh.sim.serve HOST:PORT`: the simulator's backend, until it is stopped.

`/api/data` answers what `/echo` does: it is the path that users' examples call.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

from dstack_mesh.model import TcpAddress
from dstack_mesh.sim.backend import Backend
from dstack_mesh.sim.world import BadWorldError, parse_listen

if TYPE_CHECKING:
    from collections.abc import Sequence


async def _serve(address: TcpAddress) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    backend = Backend()
    backend.on("/api/data", backend.echo)
    print(f"backend at {await backend.start(address)}", flush=True)  # noqa: T201 - its purpose
    try:
        await stopped.wait()
    finally:
        await backend.aclose()


def main(args: Sequence[str]) -> int:
    """Serve; the exit status."""
    try:
        (text,) = args
        host, port = parse_listen(text)
        asyncio.run(_serve(TcpAddress(host, port)))
    except (ValueError, BadWorldError) as error:
        print(f"usage: python -m dstack_mesh.sim.serve HOST:PORT ({error})", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        print(f"cannot listen on {text}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
